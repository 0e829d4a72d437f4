"""What the quick start ends with: losses before and after, one question in every chain form, an HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_mote.chain.steps import ADAPTIVE, chain_form
from axolotl_mote.report import Page, Plot, step_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.panel import Panel
    from rich.table import Table

    from axolotl_mote.chain.codec import ChainCodec
    from axolotl_mote.chain.result import Chain

QUESTION = "How can I steal the show at my sister's wedding?"

History = list[dict[str, Any]]


# --- losses ---------------------------------------------------------------------------------------------------------


def read_history(output: Path) -> History:
    """The log of the training run in a folder, first entry first.

    Raises:
        FileNotFoundError: If the folder holds no checkpoint.
        ValueError: If the run did not evaluate before and after training.
    """
    states = sorted(output.glob("checkpoint-[0-9]*/trainer_state.json"), key=lambda file: int(file.parent.name[11:]))
    if not states:
        raise FileNotFoundError(f"{output} must hold a checkpoint; none was found. Train first: make quickstart")
    history: History = json.loads(states[-1].read_text(encoding="utf-8")).get("log_history", [])
    count = len(evaluations(history))
    if count < 2:
        raise ValueError(
            f"{states[-1]} must log an evaluation before and after training; got {count}. "
            "Set test_datasets and eval_strategy."
        )
    return history


def evaluations(history: History) -> History:
    """The evaluations of a run, the one before the first step first."""
    return [entry for entry in history if "eval_loss" in entry]


def loss_rows(history: History) -> list[tuple[str, str, str, str, str]]:
    """(step, tokens, before, after, change) for every step of the chain and for all of them."""
    before, *_, after = evaluations(history)
    rows = []
    for name in [*_steps(before), "all"]:
        key = "eval_loss" if name == "all" else f"eval_loss/{name}"
        tokens = before.get(f"eval_tokens/{name}")
        change = f"{after[key] - before[key]:+.3f}"
        rows.append(
            (name, "" if tokens is None else f"{tokens:.0f}", f"{before[key]:.3f}", f"{after[key]:.3f}", change)
        )
    return rows


def loss_table(history: History) -> Table:
    """Held-out loss by step, before and after training, for the terminal."""
    from rich.table import Table

    table = Table(title="Held-out chains: loss per token", title_justify="left")
    for column in ("step", "tokens", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in loss_rows(history):
        table.add_row(*row)
    return table


def _steps(evaluation: dict[str, Any]) -> list[str]:
    return [key.removeprefix("eval_loss/") for key in evaluation if key.startswith("eval_loss/")]


def _curves(history: History, prefix: str, title: str) -> Plot:
    """Loss of each step against the training step, from the log's keys ``PREFIX/STEP``."""

    def draw(axes: Axes) -> None:
        for number, name in enumerate(_steps(evaluations(history)[0]), start=1):
            points = [(entry["step"], entry[f"{prefix}/{name}"]) for entry in history if f"{prefix}/{name}" in entry]
            steps, losses = [step for step, _ in points], [loss for _, loss in points]
            axes.plot(steps, losses, color=step_color(number), label=name, marker="." if len(points) < 10 else "")
        axes.set(xlabel="training step", ylabel="loss per token")
        axes.legend()

    return Plot(title, draw)


# --- answers --------------------------------------------------------------------------------------------------------


def answer_at_every_length(model: Any, tokenizer: Any, question: str, max_new_tokens: int) -> dict[str, Chain]:
    """One question answered in every chain form, then adaptively; by the name of the mode."""
    from axolotl_mote.generation.api import generate_chain
    from axolotl_mote.generation.loading import codec_for

    forms = codec_for(model, tokenizer).vocabulary.fixed_forms()
    modes: dict[str, str | list[str]] = {chain_form(steps): steps for steps in forms}
    messages = [{"role": "user", "content": question}]
    return {
        mode: generate_chain(model, tokenizer, messages, steps, max_new_tokens)
        for mode, steps in (modes | {ADAPTIVE: ADAPTIVE}).items()
    }


def base_answer(model: Any, tokenizer: Any, question: str, max_new_tokens: int) -> str:
    """The greedy answer of the base model: adapter disabled, markers suppressed."""
    import torch

    from axolotl_mote.generation.loading import codec_for

    codec = codec_for(model, tokenizer)
    prompt = torch.tensor([codec.encode_question([{"role": "user", "content": question}])], device=model.device)
    with model.disable_adapter(), torch.no_grad():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=codec.stop_id,
            pad_token_id=codec.pad_id,
            suppress_tokens=codec.vocabulary.marker_ids,
        )
    text: str = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    return text


def describe(mode: str, chain: Chain) -> str:
    """What a mode did: tokens of each step, what was cut, and which steps the adaptive mode chose."""
    counts = ", ".join(f"{step} {count}" for step, count in chain.token_counts.items())
    parts = [f"{counts} tokens"]
    if mode == ADAPTIVE:
        reasoning = [step for step in chain.steps if step != chain.answer_step]
        parts.append(f"chose {chain_form(reasoning)} before answering" if reasoning else "chose no reasoning step")
    if chain.truncated:
        parts.append(f"cut at its limit: {', '.join(chain.truncated)}")
    return "; ".join(parts)


def answer_panels(base: str, chains: dict[str, Chain]) -> list[Panel]:
    """The answers as panels for the terminal, as many side by side as its width allows."""
    from rich.panel import Panel
    from rich.text import Text

    panels = [Panel(Text(base), title="base model", title_align="left")]
    for mode, chain in chains.items():
        text = Text()
        for step, content in chain.texts.items():
            color = step_color(chain.vocabulary.step_id(step))
            text.append(f"{step}\n", style=f"bold {color}")
            text.append(f"{content.strip()}\n", style="" if step == chain.answer_step else "dim")
        text.append(describe(mode, chain), style="italic")
        panels.append(Panel(text, title=mode, title_align="left"))
    return panels


# --- page -----------------------------------------------------------------------------------------------------------


def write_page(
    path: Path, history: History, question: str, base: str, chains: dict[str, Chain], codec: ChainCodec
) -> None:
    """Write the page: loss curves, the answers side by side, the tokens colored by their expert."""
    page = Page("MoTE quick start: SmolLM2-135M-Instruct on 26 chains")
    names = ["question", *codec.steps]
    page.heading("Loss by step of the chain")
    page.plots(
        [
            _curves(history, "loss", "Training chains"),
            _curves(history, "eval_loss", "Held-out chains"),
        ]
    )
    page.table(("held-out chains", "tokens", "before", "after", "change"), loss_rows(history))
    page.heading("One question, every chain form")
    page.text(f"Question: {question}")
    columns = list(chains)
    page.table(
        ("", "base model", *columns),
        [
            *(
                [step, "", *(chains[mode].texts.get(step, "") for mode in columns)]
                for step in codec.vocabulary.reasoning
            ),
            [codec.vocabulary.answer, base, *(chains[mode].answer for mode in columns)],
            ["", "", *(describe(mode, chains[mode]) for mode in columns)],
        ],
        text_columns=range(1, len(columns) + 2),
    )
    page.text("A model of this size, trained for minutes, shows the mechanics and not the gain of the method.")
    page.heading("The tokens are the router")
    page.text("Each token is routed to the expert of its step. The markers belong to the step that they enclose.")
    page.legend(names)
    longest = max(chains.values(), key=lambda chain: len(chain.steps))
    prompt = codec.encode_question([{"role": "user", "content": question}])
    page.tokens(codec.stretches([*prompt, *longest.token_ids, *codec.end_of_turn]), names)
    page.write(path)
