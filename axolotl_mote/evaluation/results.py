"""inspect_ai logs to rows of results.jsonl: one row per system, mode, task and answer.

A log is read as it is, finished or not: what it holds becomes rows, what it lacks does not. Rows keep the order of the
prompts in the task, so the same logs give the same bytes. API keys that a server repeats in an error are taken out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inspect_ai.log import read_eval_log, read_eval_log_sample_summaries

from axolotl_mote.chain.steps import CHECK, DEFAULT_STEPS, answer_step
from axolotl_mote.evaluation.judges.verdicts import leaks
from axolotl_mote.evaluation.scorers import has_steps

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample, EvalSampleSummary
    from inspect_ai.scorer import Score

PLAIN_ANSWER = answer_step(DEFAULT_STEPS)
"""Name of the only text of a system without steps."""

_REASONING = "reasoning"
COUNTS = "counts"
"""The scorer of what needs no judge: its figures are columns of their own here."""


_IN_MEMORY = r" (?:at 0x|via cancel scope )[0-9a-f]{6,}"
"""What an error says of places in memory; they differ from run to run."""


@dataclass(frozen=True)
class Cell:
    """One system in one mode on one task.

    Args:
        system, steps, task: Their names in tables.
        benchmark: Name of the task.
        log: The log to read; None if nothing was answered yet.
        scorers: Scores to read; what else the log holds was asked for earlier.
    """

    system: str
    steps: str
    task: str
    benchmark: str
    log: Path | None
    scorers: tuple[str, ...]


def is_answered(summary: EvalSampleSummary) -> bool:
    """Whether a sample of a log is done: answered and without error."""
    return bool(summary.completed) and not summary.error


def answered_count(log: Path) -> int | None:
    """Samples of a log that are done; None if it is no log, or torn or damaged anywhere."""
    try:
        found = log.stat()
    except OSError:
        return None
    return _answered_count(log, found.st_mtime_ns, found.st_size, found.st_ino)


@lru_cache(maxsize=4096)
def _answered_count(log: Path, *_: int) -> int | None:
    """Reads all of a log, once for each state of its file."""
    try:
        read_eval_log(str(log))
        return sum(map(is_answered, read_eval_log_sample_summaries(str(log))))
    except Exception:  # noqa: BLE001  # damage shows as an error of any part: zip, zstd, JSON, a model of inspect_ai
        return None


def name_graders(log: EvalLog, grader: str | None = None) -> None:
    """Write into each score of an LLM judge which grader gave it, where that is not written yet.

    inspect_ai writes scores as they come; they are of the grader that the head of the log names. A log can hold scores
    of two graders once it was resumed or judged again.

    Args:
        log: A log of an evaluation; changed in place.
        grader: Its hash; None: the one that the head of the log names.
    """
    grader = grader or ((log.eval.metadata or {}).get("axolotl_mote") or {}).get("grader")
    for sample in log.samples or [] if grader else ():
        for score in (sample.scores or {}).values():
            judge = (score.metadata or {}).get("judge") or {}
            if judge.get("prompt_sha256") and judge.get("name"):
                judge.setdefault("grader", grader)


def read_rows(cell: Cell, secrets: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a cell, in the order of the task's prompts.

    Args:
        cell: Which log to read.
        secrets: Texts to take out, by the name that stands for them.
    """
    if cell.log is None:
        return
    log = read_eval_log(str(cell.log), resolve_attachments="full")
    name_graders(log)
    ids = log.eval.dataset.sample_ids or []
    places = {str(name): place for place, name in enumerate(ids)}
    samples = sorted(log.samples or [], key=lambda s: (places.get(str(s.id), len(ids)), str(s.id), s.epoch))
    for sample in samples:
        yield _row(cell, log, sample, secrets or {})


def _row(cell: Cell, log: EvalLog, sample: EvalSample, secrets: Mapping[str, str]) -> dict[str, Any]:
    metadata = sample.metadata or {}
    error = without_secrets(re.sub(_IN_MEMORY, "", sample.error.message), secrets) if sample.error else None
    output = sample.output if sample.output and sample.output.choices else None
    mote = ((output.metadata or {}).get("mote") if output else None) or {}
    answer = output.message.text if output else None
    usage = output.usage if output else None
    texts = mote.get("texts") or (_plain_texts(output, answer) if output else {})
    counts = mote.get("token_counts")
    if counts is None and usage is not None:
        counts = {PLAIN_ANSWER: usage.output_tokens - (usage.reasoning_tokens or 0)}
        if usage.reasoning_tokens:
            counts = {_REASONING: usage.reasoning_tokens, **counts}
    return {
        "system": cell.system,
        "steps": cell.steps,
        "task": cell.task,
        "benchmark": cell.benchmark,
        "task_version": (log.eval.metadata or {}).get("task_version"),
        "id": str(sample.id),
        "epoch": sample.epoch,
        "prompt_id": str(metadata.get("prompt_id", sample.id)),
        "category": metadata.get("category") or "",
        "label": metadata.get("label"),
        "transform": metadata.get("transform"),
        "messages": _messages(sample.input),
        "answer": answer,
        "texts": texts,
        "token_counts": counts or {},
        "output_tokens": usage.output_tokens if usage else None,
        "finished": _finished(output, mote),
        "leaked": _leaked(answer, texts, metadata, sample) if output and has_steps(output) else None,
        "error": error,
        "scores": {
            name: _score(score, secrets)
            for name, score in sorted((sample.scores or {}).items())
            if name in cell.scorers and name != COUNTS
        },
    }


def _plain_texts(output: Any, answer: str | None) -> dict[str, str]:
    """The texts of a system without steps; a reasoning model's reasoning is one of them."""
    content = output.message.content
    parts = [] if isinstance(content, str) else [p for p in content if p.type == _REASONING]
    reasoning = "\n".join(p.reasoning for p in parts if p.reasoning)
    return ({_REASONING: reasoning} if reasoning else {}) | {PLAIN_ANSWER: answer or ""}


def _finished(output: Any, mote: Mapping[str, Any]) -> bool | None:
    if output is None:
        return None
    return output.stop_reason not in ("max_tokens", "model_length") and bool(mote.get("finished", True))


def _messages(given: Any) -> list[dict[str, str]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [{"role": message.role, "content": message.text} for message in given]


def _leaked(answer: str | None, texts: Mapping[str, str], metadata: Mapping[str, Any], sample: EvalSample) -> bool:
    """Whether the answer shows reasoning of the steps before it; a system without steps cannot leak any."""
    question = metadata.get("question") or _messages(sample.input)[-1]["content"]
    steps = {name: text for name, text in texts.items() if text != answer and name != CHECK}
    return leaks(answer or "", steps, question)


def _score(score: Score, secrets: Mapping[str, str]) -> dict[str, Any]:
    metadata = score.metadata or {}
    value = _value(score.value)
    status = metadata.get("status") or ("unparsed" if value is None else "scored")
    return {
        "value": value if status == "scored" else None,
        "status": status,
        "verdict": metadata.get("verdict"),
        "judge": metadata.get("judge"),
        "explanation": None if score.explanation is None else without_secrets(score.explanation, secrets),
    }


def _value(raw: Any) -> float | None:
    """A score as a number; None for NaN and for what is no number, which is never taken for zero."""
    try:
        value = float(raw)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def without_secrets(text: str, secrets: Mapping[str, str]) -> str:
    """A text with every secret replaced by the name of its variable, ``$KEY``; also where it stands escaped."""
    for name, secret in secrets.items():
        if secret:
            spelled = "".join(r"\\+" if sign == "\\" else rf"\\*{re.escape(sign)}" for sign in secret)
            text = re.sub(spelled, lambda _, name=name: f"${name}", text)  # type: ignore[misc]
    return text
