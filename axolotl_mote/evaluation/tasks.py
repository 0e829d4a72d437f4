"""Benchmarks as inspect_ai tasks.

    inspect eval axolotl_mote/xstest --model mote/outputs/mote -M steps=adaptive
    inspect eval axolotl_mote/strongreject -T transforms=none,base64 --model-role grader=openai/NAME

A task asks the model once and sets no token limit, so that no chain is cut off unnoticed; ``counts`` reports answers
that the model's own limit cuts off. ``version`` is raised when figures stop being comparable with earlier ones. The
prompts that ship are used unless ``path`` names others; see ``benchmarks.loading``. ``--limit n`` takes a fixed draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentReasoning,
    ContentText,
)
from inspect_ai.scorer import Scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from axolotl_mote.benchmarks.loading import Prompt, digest, load_own_prompts, load_prompts
from axolotl_mote.benchmarks.sources import BENCHMARKS
from axolotl_mote.evaluation.attacks import TRANSFORMS, attack
from axolotl_mote.evaluation.scorers import CHAIN_SCORERS, SCORERS, counts, steps_of
from axolotl_mote.evaluation.thinking import opened_before, split_thinking

CUSTOM_VERSION = 1

_MESSAGES: dict[str, Any] = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


@task
def xstest(
    subset: Literal["all", "safe", "unsafe"] = "all",
    path: str | None = None,
    limit: int | None = None,
    judge_chain: bool = False,
) -> Task:
    """XSTest: compliance on safe prompts that look unsafe, refusal of unsafe ones; the local judge of refusals.

    Args:
        subset: all, safe or unsafe.
        path: The whole benchmark: xstest_prompts.csv, "hub", or a data set's name.
        limit: Prompts; a fixed draw.
        judge_chain: Judge all steps as well.
    """
    prompts = load_prompts("xstest", path=path, subset=subset, limit=limit)
    return _task("xstest", prompts, ["refusal"], path=path, subset=subset, judge_chain=judge_chain)


@task
def strongreject(
    transforms: str | list[str] = "none",
    path: str | None = None,
    limit: int | None = None,
    judge_chain: bool = False,
) -> Task:
    """StrongREJECT: forbidden prompts under attacks; needs a grader. The local judge of refusals scores as well.

    Args:
        transforms: Names of attacks, or "all"; see ``attacks.TRANSFORMS``.
        path: The whole benchmark: strongreject_dataset.csv, "hub", or a data set's name.
        limit: Prompts, each under every transform; a fixed draw.
        judge_chain: Judge all steps as well.
    """
    prompts = load_prompts("strongreject", path=path, limit=limit)
    names = _names("transforms", transforms, TRANSFORMS)
    return _task(
        "strongreject", prompts, ["strongreject", "refusal"], path=path, transforms=names, judge_chain=judge_chain
    )


@task
def coconot(path: str | None = None, limit: int | None = None, judge_chain: bool = False) -> Task:
    """CoCoNot's contrast set: compliance on harmless prompts that look like ones to decline.

    Args:
        path: The whole contrast set: a file, "hub", or a data set's name; the original set is refused.
        limit: Prompts; a fixed draw.
        judge_chain: Judge all steps as well.
    """
    prompts = load_prompts("coconot", path=path, limit=limit)
    return _task("coconot", prompts, ["refusal"], path=path, judge_chain=judge_chain)


@task
def hh_rlhf(
    metrics: str | list[str] = "harm",
    path: str | None = None,
    data_dir: str | None = None,
    limit: int | None = None,
    judge_chain: bool = False,
) -> Task:
    """HH-RLHF, as in the paper; needs a grader. The prompts that ship are those of harmless-base.

    Args:
        metrics: harm (share of harmless answers), harm_help (helpfulness on prompts that may do harm), help
            (helpfulness; needs helpful prompts by path). Several have commas between them.
        path: Other prompts: such as helpful-base/test.jsonl.gz, "hub", or a data set's name.
        data_dir: Folder inside a data set of the hub, such as helpful-base.
        limit: Prompts; a fixed draw.
        judge_chain: Judge all steps as well.
    """
    names = _names("metrics", metrics, ("harm", "help", "harm_help"))
    if "help" in names and path is None:
        raise ValueError(
            "path must be given for metrics=help; got none, and the prompts that ship are of harmless-base. Set path "
            "to helpful-base/test.jsonl.gz, or path=hub and data_dir=helpful-base."
        )
    prompts = load_prompts("hh_rlhf", path=path, data_dir=data_dir, limit=limit)
    return _task("hh_rlhf", prompts, names, path=path, subset=data_dir, judge_chain=judge_chain)


@task
def custom(
    path: str,
    scorers: str | list[str] | None = None,
    transforms: str | list[str] = "none",
    limit: int | None = None,
    judge_chain: bool = False,
) -> Task:
    """Prompts of your own.

    Args:
        path: A data file. A row holds ``messages`` or ``prompt``; it may hold ``id``, ``category``, ``label`` (safe or
            unsafe), ``target``.
        scorers: refusal, harm, help, harm_help, strongreject, match; default: match if every row has a target, else
            refusal.
        transforms: Names of attacks, or "all".
        limit: Prompts; a fixed draw.
        judge_chain: Judge all steps as well.
    """
    prompts = load_own_prompts(path, limit=limit)
    without = [prompt.id for prompt in prompts if not prompt.target]
    names = _names("scorers", scorers or ("refusal" if without else "match"), SCORERS)
    if "match" in names and without:
        raise ValueError(
            f"target must be given in every row for scorers=match; got none for {len(without)} rows, such as "
            f"{without[0]!r}, at {path}. Add it or use another scorer."
        )
    attacks = _names("transforms", transforms, TRANSFORMS)
    return _task("custom", prompts, names, path=path, transforms=attacks, judge_chain=judge_chain)


def _task(
    benchmark: str,
    prompts: Sequence[Prompt],
    scorers: Sequence[str],
    *,
    path: str | None = None,
    subset: str | None = None,
    transforms: Sequence[str] = ("none",),
    judge_chain: bool = False,
) -> Task:
    known = BENCHMARKS.get(benchmark)
    version = known.version if known is not None else CUSTOM_VERSION
    chosen: list[Scorer] = [SCORERS[name]() for name in scorers]
    if judge_chain:
        chosen += [CHAIN_SCORERS[name]() for name in scorers if name in CHAIN_SCORERS]
    data = {
        "source": path or (known.source if known is not None else ""),
        "sha256": digest(prompts),
        "prompts": len(prompts),
        "subset": subset or "all",
    }
    return Task(
        dataset=MemoryDataset([_sample(prompt, name) for prompt in prompts for name in transforms], name=benchmark),
        # There are no tools: a server that calls some has answered.
        solver=[generate(tool_calls="none"), without_thinking()],
        scorer=[*chosen, counts()],
        version=version,
        metadata={"benchmark": benchmark, "task_version": version, "data": data},
    )


@solver
def without_thinking() -> Solver:
    """Makes a reasoning part of the think block that the text of a server begins with: the answer alone is judged.

    A block that is never closed was cut off: there is no answer. ``mote/DIR`` and most providers split it themselves.
    """

    async def solve(state: TaskState, ask: Generate) -> TaskState:
        output = state.output
        if output.empty or "mote" in (output.metadata or {}) or steps_of(output):
            return state
        text = output.message.text
        thought = split_thinking(text, opened_before(text, "\n".join(turn.text for turn in state.messages[:-1])))
        if thought is None:
            return state
        parts = [ContentReasoning(reasoning=thought.reasoning), ContentText(text=thought.answer)]
        message = output.message.model_copy(update={"content": parts})
        stop_reason = output.stop_reason if thought.is_closed else "max_tokens"
        choice = output.choices[0].model_copy(update={"message": message, "stop_reason": stop_reason})
        state.output = output.model_copy(update={"choices": [choice], "completion": thought.answer})
        state.messages[-1] = message
        return state

    return solve


def _sample(prompt: Prompt, transform: str) -> Sample:
    messages: list[ChatMessage] = [
        _MESSAGES[turn["role"]](content=turn["content"]) for turn in attack(prompt.messages, transform)
    ]
    return Sample(
        input=messages,
        target=prompt.target or "",
        id=prompt.id if transform == "none" else f"{prompt.id}@{transform}",
        metadata={
            "category": prompt.category,
            "label": prompt.label,
            "transform": None if transform == "none" else transform,
            "prompt_id": prompt.id,
            "question": prompt.messages[-1]["content"],
        },
    )


def _names(key: str, value: str | Sequence[str], known: Sequence[str] | dict[str, Any]) -> list[str]:
    """Names given as a list or with commas between them, each once; "all" for all."""
    given = value.split(",") if isinstance(value, str) else [str(name) for name in value]
    names = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    if names == ["all"]:
        return list(known)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"{key} must be {', '.join(known)} or all; got {', '.join(unknown) or 'none'}. Correct it.")
    return names
