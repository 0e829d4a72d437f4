"""``axolotl mote generate``: a file of questions in, a file of chains out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_mote.chain.steps import chain_form, parse_form
from axolotl_mote.cli._options import decoding_options, model_options, parse_limits, sampling_arguments, usage_errors
from axolotl_mote.files import folder_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from axolotl_mote.chain.questions import Question
    from axolotl_mote.chain.vocabulary import StepVocabulary
    from axolotl_mote.generation.answers import AnswerFile

Modes = dict[str, str | list[str]]
"""Mode name, as in the output -> what ``generate_chain`` takes for ``steps``."""


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
    default=("adaptive",),
    show_default=True,
    help="adaptive, verify, a form such as analysis+response, or all; may be repeated.",
)
@decoding_options
@click.option("--num-beams", default=1, show_default=True, type=click.IntRange(1), help="Number of beams.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Questions decoded together.")
@click.option("--limit", type=click.IntRange(1), help="Answer only the first N rows.")
@click.option("--overwrite", is_flag=True, help="Start the output anew instead of continuing it.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
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
    from axolotl_mote.generation import answers

    with usage_errors():
        if output.exists() and output.samefile(source):
            raise ValueError(f"output must not be the input; got {output} for both. Choose another file.")
        digests = answers.check_questions(source, limit)
        settings = sampling_arguments(**decoding) | {"step_limits": parse_limits(decoding["step_limit"])}
        settings |= {"max_new_tokens": decoding["max_new_tokens"], "num_beams": num_beams}
        seed = decoding["seed"] if decoding["sample"] else None
        fingerprint = run_fingerprint(adapter, base_model, dtype, settings, seed, batch_size, decoding["check"])

        from axolotl_mote.generation.loading import codec_for, load_mote

        model, tokenizer = load_mote(adapter, base_model, dtype=dtype, device=device)
        vocabulary = codec_for(model, tokenizer).vocabulary
        chosen = expand_modes(modes, vocabulary)
        _check_modes(chosen, vocabulary, decoding["check"])
        with answers.AnswerFile(output, tuple(chosen), fingerprint, digests, overwrite=overwrite) as file:
            if file.resumed or file.torn:
                found = f"{file.resumed} answers{' and a torn line' if file.torn else ''}"
                click.echo(f"{output} holds {found}; continuing.", err=True)
            runner = Runner(model, tokenizer, chosen, file, settings, seed, decoding["check"])
            questions = answers.read_questions(source, limit)
            try:
                for window in _progress(answers.windows(questions, batch_size), sum(map(bool, digests))):
                    runner.answer(window)
            except KeyboardInterrupt:
                raise click.ClickException("interrupted; run the same command again to continue.") from None
        _report(answers.summarize(output), as_json)


class Runner:
    """Answers windows of questions in every mode and writes each batch as soon as it is done.

    Args:
        model: From ``load_mote``.
        tokenizer: From ``load_mote``.
        modes: The modes.
        output: Where answers go, and which are there already.
        settings: Further arguments for ``generate_chain``.
        seed: Seed of sampling; None for greedy decoding.
        check: Whether the trained check step judges the answers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        modes: Modes,
        output: AnswerFile,
        settings: dict[str, Any],
        seed: int | None = None,
        check: bool = False,
    ) -> None:
        from axolotl_mote.generation.decoding import context_length
        from axolotl_mote.generation.loading import codec_for

        self.model, self.tokenizer, self.modes, self.output = model, tokenizer, modes, output
        self.settings, self.seed, self.check = settings, seed, check
        self.codec = codec_for(model, tokenizer)
        self.positions = context_length(model)

    def answer(self, window: Sequence[Question]) -> None:
        """Answer those questions of a window that have no answer yet."""
        from axolotl_mote.chain.result import refused_row
        from axolotl_mote.generation.answers import answer_row
        from axolotl_mote.generation.api import generate_chain

        for mode, steps in self.modes.items():
            todo = [q for q in window if not self.output.holds(q.row, mode)]
            faults = {q.row: fault for q in todo if (fault := self._refusal(q))}
            fitting = [q for q in todo if q.row not in faults]
            chains = generate_chain(
                self.model,
                self.tokenizer,
                [q.messages for q in fitting],
                steps,
                check=self.check and mode != "verify",
                batch_size=max(1, len(fitting)),
                seed=None if self.seed is None else self.seed + window[0].row,
                **self.settings,
            )
            rows = {q.row: chain.to_row() for q, chain in zip(fitting, chains, strict=True)}
            rows |= {row: refused_row(self.codec.vocabulary, fault) for row, fault in faults.items()}
            if todo:
                self.output.append(answer_row(q, mode, self.output.run, rows[q.row]) for q in todo)

    def _refusal(self, question: Question) -> str | None:
        """Why a question cannot be answered: the chat template refuses it, or it leaves no room for an answer."""
        try:
            needed = len(self.codec.encode_question(question.messages)) + self.settings["max_new_tokens"]
        except ValueError as error:
            return str(error)
        if self.positions is None or needed <= self.positions:
            return None
        return f"question and max_new_tokens take {needed} positions; the model has {self.positions}"


def expand_modes(modes: Sequence[str], vocabulary: StepVocabulary) -> Modes:
    """Modes as the user names them; "all" is every chain length, adaptive and verify."""
    chosen: Modes = {}
    for mode in modes:
        if mode == "all":
            for depth in range(len(vocabulary.reasoning) + 1):
                names = [*vocabulary.reasoning[:depth], vocabulary.answer]
                chosen[chain_form(names)] = names
            chosen |= {"adaptive": "adaptive", "verify": "verify"}
        elif mode in ("adaptive", "verify"):
            chosen[mode] = mode
        else:
            names = parse_form(mode)
            chosen[chain_form(names)] = names
    return chosen


def _check_modes(modes: Modes, vocabulary: StepVocabulary, check: bool) -> None:
    from axolotl_mote.generation.grammar import make_plan

    for steps in modes.values():
        if steps != "verify":
            make_plan(steps, vocabulary, check)


def run_fingerprint(
    adapter: Path,
    base_model: str | None,
    dtype: str,
    settings: dict[str, Any],
    seed: int | None,
    batch_size: int,
    check: bool,
) -> str:
    """Twelve hexadecimal digits: a hash of the adapter, the base model's folder and everything that shapes an answer.

    Greedy answers do not depend on the batch size, sampled ones do.
    """
    from axolotl_mote.generation.answers import FORMAT

    digest = hashlib.sha256()
    base = base_model
    if (adapter / "adapter_config.json").is_file():
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        for name in ("target_modules", "exclude_modules"):  # sets, which peft writes in any order
            if isinstance(config.get(name), list):
                config[name] = sorted(config[name])
        digest.update(json.dumps(config, sort_keys=True).encode())
        base = base or config.get("base_model_name_or_path")
    for name in ("adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (adapter / name).is_file():
            with (adapter / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    if base and Path(base).is_dir():
        digest.update(folder_digest(Path(base)).encode())
    shape = [FORMAT, base_model, dtype, settings, seed, batch_size if seed is not None else None, check]
    digest.update(json.dumps(shape, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def _progress(windows: Iterator[list[Question]], count: int) -> Iterator[list[Question]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("questions", total=count)
        for window in windows:
            yield window
            progress.advance(task, len(window))


def _report(summary: dict[str, dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary))
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
