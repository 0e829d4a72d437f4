"""Time and peak memory of a build with many questions, without a model: a stand-in answers at once.

    python tests/bench/build_memory.py [QUESTIONS] [DEDUPLICATE]

Every answer is checked and half of the first answers are unsafe, so a question takes 3.5 calls on average. DEDUPLICATE
is the build file's key; ``null``, the default here, leaves the near-duplicate search out: near_duplicates.py times it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from axolotl_mote.builder.clients import server
from axolotl_mote.builder.clients.calls import BudgetMeter, Call, Completion
from axolotl_mote.builder.run import build
from axolotl_mote.builder.settings import ServerModel, Settings, Stage

WORDS = [
    f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u") for c in ("", "la", "ren", "st", "mok")
]


def text(seed: int, words: int) -> str:
    """Words drawn with a seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


class StandIn:
    """Answers at once, with a text drawn from the seed of the call."""

    def __init__(self, spec: ServerModel, budget: BudgetMeter, *_: Any) -> None:
        self._budget = budget

    async def complete(self, call: Call, stage: Stage) -> Completion:
        """A verdict, or a text of 120 words."""
        self._budget.start()
        await asyncio.sleep(0)
        if call.stage == "check":
            safe = call.seed % 2 or call.round == 1
            return Completion("Judged.\nVERDICT: " + ("SAFE" if safe else "UNSAFE"), "stop", 200, 8, "stand-in")
        return Completion(text(call.seed, 120), "stop", 100, 160, "stand-in")

    async def aclose(self) -> None:
        """Nothing to close."""


def write_questions(path: Path, count: int) -> None:
    """Questions of 30 words, with two further columns."""
    with path.open("w") as file:
        for number in range(count):
            row = {"prompt": text(-number - 1, 30) + "?", "id": f"q{number}", "topic": text(number, 3)}
            file.write(json.dumps(row) + "\n")


def peak() -> float:
    """Peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(count: int, deduplicate: float | None) -> None:
    """Build, resume, and print what each took."""
    logging.disable(logging.WARNING)
    server.ServerClient = StandIn  # type: ignore[assignment, misc]
    outputs = Path("outputs")  # on a real disk: /tmp may be memory
    outputs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=outputs) as name:
        folder = Path(name)
        write_questions(folder / "questions.jsonl", count)
        settings = Settings.model_validate(
            {
                "output": folder / "out",
                "questions": [{"path": str(folder / "questions.jsonl")}],
                "deduplicate": deduplicate,
                "models": {"default": {"type": "server", "model": "m", "base_urls": ["http://127.0.0.1:9/v1"]}},
            }
        )
        before = peak()
        for run in ("first run", "resumed"):
            started, used = time.monotonic(), time.process_time()
            peaks: list[float] = []
            report = build(settings, on_progress=lambda _, peaks=peaks: peaks or peaks.append(peak()))
            size = (settings.output / "journal.jsonl").stat().st_size / 2**20
            print(
                f"{run}: {count} questions, {report.requests} requests, {report.counts['kept']} kept, journal "
                f"{size:.0f} MiB, {time.monotonic() - started:.0f} s ({report.seconds:.0f} s before results were "
                f"written), {time.process_time() - used:.0f} s of CPU; peak memory {before:.0f} MiB before the build, "
                f"{peaks[0]:.0f} MiB once the questions were read, {peak():.0f} MiB at the end",
                flush=True,
            )


if __name__ == "__main__":
    arguments = [json.loads(value) for value in sys.argv[1:]]
    main(*(arguments + [100_000, None][len(arguments) :]))
