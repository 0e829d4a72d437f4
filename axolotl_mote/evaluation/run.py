"""Systems x modes x tasks through inspect_ai, one after another; then results.jsonl, summary.json and report.html.

A run drives the parts in ``running``: it plans the cells, answers and judges them system by system, and writes the
results of what is there, however it ended. A server that does not answer costs its own cells alone. The weights of one
local system are in memory at a time, beside those of a local grader.

    output/runs.jsonl                           one line per run; locked while a run goes on
    output/logs/SYSTEM/MODE/TASK-HASH/*.eval    logs of inspect_ai; a renamed system goes on in its earlier folder
    output/manifest.json                        cells: what was planned, what is there, settings, versions
    output/results.jsonl, summary.json, report.html
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from inspect_ai.model import Model

from axolotl_mote.evaluation.figures.summary import Summary
from axolotl_mote.evaluation.results import without_secrets
from axolotl_mote.evaluation.running.answering import Interrupted, answer
from axolotl_mote.evaluation.running.cells import Job, is_graded, plan
from axolotl_mote.evaluation.running.endpoints import closing, grader_of, kept, server_fault
from axolotl_mote.evaluation.running.judging import JudgeAgain, Tell
from axolotl_mote.evaluation.running.logs import remove_superseded, secrets_of, tidy_logs
from axolotl_mote.evaluation.running.outputs import versions, write_results
from axolotl_mote.evaluation.settings import Settings, System
from axolotl_mote.files import AppendLog

_FAULT_LENGTH = 300


@dataclass
class Report:
    """What a run leaves behind.

    Args:
        summary: The figures, and what is missing.
        interrupted: Whether Ctrl-C stopped it.
        answered, judged: Answers given, and judged again, by this run.
        seconds: Of this run.
    """

    summary: Summary
    interrupted: bool
    answered: int
    judged: int
    seconds: float

    @property
    def faults(self) -> list[str]:
        """What is missing, and why."""
        return self.summary.missing


def run(settings: Settings, *, tell: Tell = lambda _: None, display: str = "none") -> Report:
    """Run an evaluation, or continue one, and write its results.

    Args:
        settings: The evaluation.
        tell: Called with a line of progress.
        display: How inspect_ai shows progress: none, plain, rich or full.

    Raises:
        FileInUseError: If another run uses the output folder.
        ValueError: If tasks or systems cannot be used.
    """
    began = time.monotonic()
    jobs = plan(settings)
    answered = judged = 0
    interrupted = False
    with AppendLog(settings.output / "runs.jsonl", begins=b'{"') as runs:
        runs.append([_run_record(settings)])
        judging = _Judging(settings, jobs, tell)
        try:
            with kept(settings.grader):
                for system in settings.systems:
                    mine = [job for job in jobs if job.system is system]
                    for record in _run_system(settings, system, mine, judging, tell, display):
                        runs.append([record])
                        answered, judged = answered + record["answered"], judged + record["judged"]
        except (Interrupted, KeyboardInterrupt):
            interrupted = True
            tell("Interrupted. Writing the results of what is there.")
        summary = write_results(settings, jobs, judging.faults)
    return Report(summary, interrupted, answered, judged, time.monotonic() - began)


class _Judging:
    """The grader, if it answers."""

    def __init__(self, settings: Settings, jobs: Sequence[Job], tell: Tell) -> None:
        self._settings = settings
        self.faults: list[str] = []
        fault = server_fault(settings.grader) if settings.grader else None
        self._alive = settings.grader is not None and fault is None
        if settings.grader is None and any(is_graded(name) for job in jobs for name in job.scorers):
            tell("There is no grader: what only it can judge stays unscored. Add grader: to the evaluation file.")
        if fault:
            self.faults.append(f"grader: {fault}. Its scores are missing; run again once it answers.")
            tell(self.faults[-1])

    @contextmanager
    def grader(self) -> Iterator[Model | None]:
        """A new model for a cell; None if there is none that answers."""
        model = grader_of(self._settings) if self._alive else None
        with closing(self._settings.grader, model):
            yield model


def _run_system(
    settings: Settings, system: System, jobs: Sequence[Job], judging: _Judging, tell: Tell, display: str
) -> Iterator[dict[str, Any]]:
    """Answer and judge the cells of a system; yields what was done, for runs.jsonl."""
    missing = any(job.answered() < job.total for job in jobs)
    fault = server_fault(system) if missing else None
    if fault:
        tell(f"{system.name}: {fault}. Going on with the next system.")
    with kept(system if missing and not fault else None):
        for job in jobs:
            before, began, judged = job.answered(), time.monotonic(), 0
            if before < job.total:
                job.fault = fault
            if before < job.total and not fault:
                tell(f"{job.name}: {job.total - before} of {job.total} answers to generate")
                _answer(settings, job, judging, tell, display)
            answered, seconds = job.answered() - before, time.monotonic() - began
            best = job.best_log()
            if best is not None:
                with judging.grader() as grader:
                    judged = JudgeAgain(settings, grader).run(job, best, tell, display)
            if before + answered == job.total:
                remove_superseded(job)
            if answered or judged:
                name = {"system": system.name, "mode": job.mode, "task": job.spec.title}
                yield {**name, "answered": answered, "seconds": round(seconds, 3), "judged": judged}


def _answer(settings: Settings, job: Job, judging: _Judging, tell: Tell, display: str) -> None:
    secrets = secrets_of(settings)
    try:
        with judging.grader() as grader:
            stopped, reasons = answer(settings, job, grader, display)
    finally:
        tidy_logs(job, secrets)
    if stopped is not None:
        job.fault = _short(without_secrets(stopped, secrets))
        tell(f"{job.name}: stopped: {job.fault}")
    elif reasons:
        tell(f"{job.name}: {len(reasons)} failed, such as: {_short(without_secrets(reasons[0], secrets))}")
    tell(f"{job.name}: {job.answered()} of {job.total} answers")


def _short(text: str) -> str:
    return text if len(text) <= _FAULT_LENGTH else f"{text[:_FAULT_LENGTH]} ..."


def _run_record(settings: Settings) -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }
