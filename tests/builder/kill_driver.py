"""Runs builds in forked children that are killed at random moments; prints one JSON line. Used by test_run.py.

The model is a stand-in for the local client: its texts depend on the seeds of the calls *and* on who else is in the
batch, which makes a resumed build that forms other batches visible.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from builder_kit import prompts, write_rows

from axolotl_mote.builder.clients.calls import BudgetMeter, Call, Completion
from axolotl_mote.builder.output import results
from axolotl_mote.builder.run import build
from axolotl_mote.builder.settings import LocalModel, Settings, Stage


class StandIn:
    """Quick deterministic texts; verdicts are safe in about half of all cases, some texts are defective."""

    def __init__(self, spec: LocalModel, budget: BudgetMeter) -> None:
        self._budget = budget

    def complete_batch(self, calls: Sequence[Call], stage: Stage) -> list[Completion]:
        self._budget.start(len(calls))
        time.sleep(0.002)
        beside = ",".join(call.key for call in calls)
        return [self._one(call, beside) for call in calls]

    def _one(self, call: Call, beside: str) -> Completion:
        digest = hashlib.sha256(f"{call.seed} {beside}".encode()).hexdigest()
        if call.stage == "check":
            return Completion(
                f"VERDICT: {'SAFE' if digest[0] < '7' else 'UNSAFE'}" if digest[1] != "0" else "?", "stop"
            )
        return Completion(
            f"{call.stage} {' '.join(digest[i : i + 5] for i in range(0, 60, 5))}",
            "length" if digest[1] < "2" else "stop",
        )


def settings(folder: Path, questions: Path) -> Settings:
    return Settings.model_validate(
        {
            "output": folder,
            "questions": [{"path": str(questions)}],
            "models": {"default": {"type": "local", "path": "stand-in", "batch_size": 4}},
        }
    )


def run_child(job: Settings, seconds: float | None) -> bool:
    """Build in a child, kill it after some seconds; True if it had finished."""
    child = os.fork()
    if child == 0:
        os._exit(0 if not build(job).counts["pending"] else 1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def main(folder: Path, kills: int) -> None:
    module = ModuleType("axolotl_mote.builder.clients.local")
    module.LocalClient = StandIn  # type: ignore[attr-defined]
    sys.modules["axolotl_mote.builder.clients.local"] = module
    results.write_html = lambda path, *_, **__: path.touch()  # drawing the page takes longer than a build
    questions = write_rows(folder / "q.jsonl", prompts(24))
    whole, broken = settings(folder / "whole", questions), settings(folder / "broken", questions)
    build(whole)
    started = time.monotonic()
    build(settings(folder / "timing", questions))
    duration = time.monotonic() - started
    rng = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else time.time_ns())
    killed, torn, rounds = 0, 0, 0
    while killed < kills:
        broken = settings(folder / f"broken{rounds}", questions)
        rounds += 1
        while killed < kills and not run_child(broken, rng.uniform(0, duration)):
            killed += 1
            journal = broken.output / "journal.jsonl"
            if journal.exists() and killed % 3 == 0:  # a crash of the machine may also tear the last line
                journal.write_bytes(journal.read_bytes()[: -rng.randint(1, 60)])
                torn += 1
        build(broken)
    same = all(
        (folder / f"broken{i}" / name).read_bytes() == (folder / "whole" / name).read_bytes()
        for i in range(rounds)
        for name in ("chains.jsonl", "rejected.jsonl")
    )
    keys = [json.loads(line)["call"] for line in (broken.output / "journal.jsonl").read_text().splitlines()[1:]]
    rows = (folder / "whole" / "chains.jsonl").read_text().splitlines()
    print(
        json.dumps(
            {
                "kills": killed,
                "torn": torn,
                "same": same,
                "twice": len(keys) - len(set(keys)),
                "rounds": rounds,
                "kept": len(rows),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
