"""What inspect_ai costs: a whole evaluation with ``mote/DIR`` beside ``axolotl mote generate`` on the same questions.

    .venv-eval/bin/python tests/bench/provider.py --model models/SmolLM2-135M-Instruct

Both answer the same questions in the same mode with the same batch size, in turns within a round. On the CPU the CPU
time of one thread is counted, so a busy machine slows both alike. The evaluation has no scorer; its log is written. The
table shows medians over the rounds, and the median of the ratios of the rounds: below 1 is faster. The adapter is
random: its chains end at the limit or by chance, and both generate the same ones.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageUser, get_model
from kit import save_adapter, smol_mote

from axolotl_mote.files import read_jsonl
from axolotl_mote.generation import load_mote
from axolotl_mote.generation.answers import AnswerFile, check_questions, read_questions, windows
from axolotl_mote.generation.runner import Runner, parse_mode

QUESTIONS = Path(__file__).resolve().parent.parent / "data" / "questions_64.jsonl"

Texts = dict[int, Any]
"""Row of a question -> texts of its steps."""


def command(model: Any, tokenizer: Any, mode: str, count: int, batch: int, tokens: int, path: Path) -> Callable:
    """``axolotl mote generate`` without loading: tokens generated, and the texts."""

    def run() -> tuple[int, Texts]:
        digests = check_questions(QUESTIONS, count)
        with AnswerFile(path, (mode,), "bench", digests, overwrite=True) as output:
            settings = {"max_new_tokens": tokens, "step_limits": None, "num_beams": 1}
            runner = Runner(model, tokenizer, {mode: parse_mode(mode)}, output, settings)
            for window in windows(read_questions(QUESTIONS, count), batch):
                runner.answer(window)
        rows = [row for _, row in read_jsonl(path)]
        return sum(row["spent"] for row in rows), {
            row["row"]: {step: row[step] for step in row["steps"]} for row in rows
        }

    return run


def evaluation(folder: Path, mode: str, count: int, batch: int, tokens: int, device: str, logs: Path) -> Callable:
    """``inspect eval`` without loading: tokens generated, and the texts."""
    model = get_model(f"mote/{folder}", steps=mode, batch_size=batch, max_new_tokens=tokens, device=device)

    def run() -> tuple[int, Texts]:
        samples = [
            Sample(input=[ChatMessageUser(content=turn["content"]) for turn in question.messages], id=question.row)
            for question in read_questions(QUESTIONS, count)
        ]
        log = eval(Task(dataset=samples), model=model, log_dir=str(logs), display="none")[0]
        assert log.status == "success", log.error
        outputs = {sample.id: sample.output for sample in log.samples or []}
        texts = {row: output.metadata["mote"]["texts"] for row, output in outputs.items()}
        return sum(output.usage.output_tokens for output in outputs.values()), texts

    return run


def timed(call: Callable, device: str) -> tuple[float, int, Texts]:
    """Seconds for each token, tokens, texts: CPU time of the process on the CPU, wall time on a GPU."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    start = clock()
    tokens, texts = call()
    return (clock() - start) / tokens, tokens, texts


@click.command()
@click.option("--model", "folder", required=True, type=Path, help="Base model folder.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--steps", "mode", default="adaptive", show_default=True)
@click.option("--questions", "count", default=32, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Tokens of a chain at most.")
@click.option("--rounds", default=3, show_default=True)
def main(folder: Path, device: str, mode: str, count: int, batch: int, tokens: int, rounds: int) -> None:
    """Print a Markdown table of milliseconds per token."""
    if not device.startswith("cuda"):
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_adapter(*smol_mote(folder), work / "mote", folder.absolute())
        model, tokenizer = load_mote(work / "mote", device=device)
        calls = {
            "axolotl mote generate": command(model, tokenizer, mode, count, batch, tokens, work / "out.jsonl"),
            "inspect eval": evaluation(work / "mote", mode, count, batch, tokens, device, work / "logs"),
        }
        for call in calls.values():
            call()
        taken: dict[str, list[float]] = {key: [] for key in calls}
        generated: dict[str, int] = {}
        texts: dict[str, Texts] = {}
        for _ in range(rounds):
            for key, call in calls.items():
                seconds, generated[key], texts[key] = timed(call, device)
                taken[key].append(seconds)
    print(f"{folder.name}, {device}, {torch.get_num_threads()} thread(s); {count} questions, {mode}, batch {batch}, ")
    print(f"at most {tokens} tokens; median of {rounds} interleaved rounds\n")
    print("| through | tokens | ms / token | time / time of the command, below 1 is faster |\n|---|---|---|---|")
    reference = taken["axolotl mote generate"]
    for key, times in taken.items():
        ratio = statistics.median(t / r for r, t in zip(reference, times, strict=True))
        print(f"| {key} | {generated[key]} | {1000 * statistics.median(times):.2f} | {ratio:.3f} |")
    one, two = texts.values()
    print(f"\nequal texts: {sum(one[row] == two.get(row) for row in one)} of {count}")


if __name__ == "__main__":
    main()
