"""``axolotl mote generate``: a file of questions in, a file of chains out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_mote.chain.steps import ADAPTIVE
from axolotl_mote.cli._options import (
    decoding_options,
    json_option,
    model_options,
    parse_limits,
    sampling_arguments,
    usage_errors,
)
from axolotl_mote.cli.json_output import json_writer

if TYPE_CHECKING:
    from axolotl_mote.chain.questions import Question


@click.command()
@model_options
@click.option(
    "--input",
    "source",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSONL with one question per line.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSONL to write; continued if it exists.",
)
@click.option(
    "--steps",
    "modes",
    multiple=True,
    default=(ADAPTIVE,),
    show_default=True,
    help="adaptive, verify, a form such as analysis+response, or all; may be repeated.",
)
@decoding_options
@click.option("--num-beams", default=1, show_default=True, type=click.IntRange(1), help="Number of beams.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Questions decoded together.")
@click.option("--limit", type=click.IntRange(1), help="Answer only the first N rows.")
@click.option("--overwrite", is_flag=True, help="Empty the output first instead of continuing it.")
@json_option("Print the summary as JSON.")
def command(
    adapter: Path,
    base_model: str | None,
    dtype: str,
    device: str | None,
    source: Path,
    output: Path,
    modes: tuple[str, ...],
    num_beams: int,
    batch_size: int,
    limit: int | None,
    overwrite: bool,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Answer a file of questions with a trained adapter.

    Each input line holds `messages` (a dialogue that ends with a user turn) or one question as `prompt` or `question`.
    Each output line holds the chain: the text of every step, the steps, token counts, and whether the model finished
    its answer. You can kill the command at any time; run it again to continue.

    \b
    Examples:
      axolotl mote generate --adapter outputs/mote --input questions.jsonl --output chains.jsonl
      axolotl mote generate --adapter outputs/mote --input questions.jsonl --output curve.jsonl --steps all
      axolotl mote generate --adapter outputs/mote --input questions.jsonl --output short.jsonl \\
          --steps analysis+response --step-limit analysis=64 --batch-size 16 --sample --seed 7
    """
    write_json = json_writer() if as_json else None
    with usage_errors(), _interruptible():
        from axolotl_mote.generation import answers

        if output.exists() and output.samefile(source):
            raise ValueError(f"output must not be the input; got {output} for both. Choose another file.")
        digests = answers.check_questions(source, limit)
        settings = sampling_arguments(**decoding) | {"step_limits": parse_limits(decoding["step_limit"])}
        settings |= {"max_new_tokens": decoding["max_new_tokens"], "num_beams": num_beams}
        seed = decoding["seed"] if decoding["sample"] else None

        from axolotl_mote.generation.folder import read_config
        from axolotl_mote.generation.loading import codec_for, load_mote
        from axolotl_mote.generation.runner import Runner, expand_modes, run_fingerprint

        read_config(adapter)  # the fingerprint needs sound values
        fingerprint = run_fingerprint(adapter, base_model, dtype, settings, seed, batch_size, decoding["check"])
        model, tokenizer = load_mote(adapter, base_model, dtype=dtype, device=device)
        chosen = expand_modes(modes, codec_for(model, tokenizer).vocabulary, decoding["check"])
        with answers.AnswerFile(output, tuple(chosen), fingerprint, digests, overwrite=overwrite) as file:
            if file.resumed or file.torn:
                found = f"{file.resumed} answers{' and a torn line' if file.torn else ''}"
                click.echo(f"{output} holds {found}; continuing.", err=True)
            runner = Runner(model, tokenizer, chosen, file, settings, seed, decoding["check"])
            questions = answers.read_questions(source, limit)
            for window in _progress(answers.windows(questions, batch_size), sum(map(bool, digests))):
                runner.answer(window)
        _report(answers.summarize_answers(output), write_json)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say what Ctrl-C means here, at whatever moment it comes."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("Interrupted; run the same command again to continue.", err=True)
        raise


def _progress(windows: Iterator[list[Question]], count: int) -> Iterator[list[Question]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("questions", total=count)
        for window in windows:
            yield window
            progress.advance(task, len(window))


def _report(summary: dict[str, dict[str, Any]], write_json: Callable[[dict[str, Any]], None] | None) -> None:
    if write_json is not None:
        write_json(summary)
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("steps", overflow="fold"), "rows", "finished", "refused", "tokens a row", "tokens a step", "verdicts"
    )
    for mode, figures in summary.items():
        tokens = ", ".join(f"{name} {value:g}" for name, value in figures["step_tokens_per_row"].items())
        verdicts = ", ".join(f"{name} {value}" for name, value in figures["verdicts"].items())
        table.add_row(
            mode, *(str(figures[k]) for k in ("rows", "finished", "refused", "tokens_per_row")), tokens, verdicts
        )
    Console().print(table)
