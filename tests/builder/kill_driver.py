"""Runs builds in forked children that are killed at random moments; prints one JSON line. Used by test_run.py.

    python kill_driver.py FOLDER KILLS local|server [SEED]

The model is a stand-in. For the local client, its texts depend on the seeds of the calls *and* on who else is in the
batch, which makes a resumed build that forms other batches visible. For servers they depend on the seeds alone, and 8
questions run at the same time. A child reports how many questions are done; the journal must know as many.
"""

from __future__ import annotations

import asyncio
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

from builder_kit import prompts as question_rows
from builder_kit import write_rows

from axolotl_mote.builder.clients.calls import BudgetMeter, Call, Completion
from axolotl_mote.builder.loop.journal import Journal
from axolotl_mote.builder.loop.replay import replay
from axolotl_mote.builder.output import results
from axolotl_mote.builder.run import build
from axolotl_mote.builder.settings import LocalModel, ServerModel, Settings, Stage, identity
from axolotl_mote.builder.texts.prompts import Prompts
from axolotl_mote.builder.texts.questions import load_questions


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


class StandInServer(StandIn):
    """The same for servers: every call on its own."""

    def __init__(self, spec: ServerModel, budget: BudgetMeter, answered: bool) -> None:
        self._budget = budget

    async def complete(self, call: Call, stage: Stage) -> Completion:
        self._budget.start()
        await asyncio.sleep(0.002 * (call.seed % 3))
        return self._one(call, "")

    async def aclose(self) -> None:
        pass


MODELS = {
    "local": {"type": "local", "path": "stand-in", "batch_size": 4},
    "server": {"type": "server", "model": "stand-in", "base_urls": ["http://none"], "concurrency": 8},
}


def settings(folder: Path, questions: Path, kind: str) -> Settings:
    return Settings.model_validate(
        {"output": folder, "questions": [{"path": str(questions)}], "models": {"default": MODELS[kind]}}
    )


def run_child(job: Settings, seconds: float) -> tuple[bool, int]:
    """Build in a child, kill it after some seconds; whether it had finished, and how many questions it reported."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        report = build(job, on_progress=lambda status: os.write(writing, f"{status.done}\n".encode()) and None)
        os._exit(0 if not report.counts["pending"] else 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as reported:
        done = max(map(int, reported.read().split()), default=0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, done


def finished(job: Settings) -> int:
    """How many questions the journal knows the outcome of."""
    prompts = Prompts(job.active_specs())
    questions, _ = load_questions(job.questions, (), job.deduplicate, job.seed)
    with Journal(job.output / "journal.jsonl", identity(job, prompts.hashes)) as journal:
        return sum(replay(question, job, prompts, journal) is not None for question in questions)


def main(folder: Path, kills: int, kind: str) -> None:
    local = ModuleType("axolotl_mote.builder.clients.local")
    local.LocalClient = StandIn  # type: ignore[attr-defined]
    server = ModuleType("axolotl_mote.builder.clients.server")
    server.ServerClient = StandInServer  # type: ignore[attr-defined]
    sys.modules.update({module.__name__: module for module in (local, server)})
    results.write_html = lambda path, *_, **__: path.touch()  # drawing the page takes longer than a build
    questions = write_rows(folder / "q.jsonl", question_rows(24))
    whole, broken = settings(folder / "whole", questions, kind), settings(folder / "broken", questions, kind)
    build(whole)
    started = time.monotonic()
    build(settings(folder / "timing", questions, kind))
    duration = time.monotonic() - started
    rng = random.Random(int(sys.argv[4]) if len(sys.argv) > 4 else time.time_ns())
    killed, torn, rounds, lost = 0, 0, 0, 0
    while killed < kills:
        broken = settings(folder / f"broken{rounds}", questions, kind)
        rounds += 1
        while killed < kills:
            whole_build, done = run_child(broken, rng.uniform(0, duration))
            lost += max(0, done - finished(broken))
            if whole_build:
                break
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
                "lost": lost,
                "same": same,
                "twice": len(keys) - len(set(keys)),
                "rounds": rounds,
                "kept": len(rows),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
