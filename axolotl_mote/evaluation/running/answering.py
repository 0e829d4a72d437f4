"""The answers that a cell lacks, generated and scored by inspect_ai.

A cell that was killed goes on from the log that holds the most answers. A prompt that fails does not stop the others; a
server that is gone does. Answers that are there but lack a score are left to ``judging``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from inspect_ai import eval as inspect_eval
from inspect_ai import task_with
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import Model
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import EarlyStop, EarlyStopping

from axolotl_mote.evaluation.compat import resumed
from axolotl_mote.evaluation.results import name_graders
from axolotl_mote.evaluation.running.cells import Job, make_task
from axolotl_mote.evaluation.running.endpoints import (
    closing,
    grader_hash,
    model_of,
    one_line,
    reason,
    server_fault,
    status_of,
)
from axolotl_mote.evaluation.settings import Endpoint, Settings, identity_hash

_FAILURES = 4
"""Requests in a row, beyond those in flight, after whose failure a server counts as gone."""

_SERVERS_FAULT = (401, 408, 409, 429)
"""Statuses below 500 that are not about the prompt."""


class Interrupted(Exception):
    """Ctrl-C while a cell was answered; what was finished is in its log."""


class _NoAnswer(Exception):
    """A prompt that has no answer; ``message`` is what the log says of it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class _Watch(EarlyStopping):
    """Asks, says in one line why a prompt failed, and stops asking a server that is gone.

    A server is gone if it does not answer when it is asked for its models, or if many requests in a row fail for other
    reasons than the prompt. Prompts that failed in an earlier run count for nothing in this, so that every run asks
    some that were not asked before. What was not asked leaves no trace in the log and is asked in the next run.

    Args:
        endpoint: The system.
        inner: Asks a prompt.
        failed: Prompts and epochs that failed before.
    """

    def __init__(self, endpoint: Endpoint, inner: Any, failed: set[tuple[str, int]]) -> None:
        self._endpoint, self._inner, self._failed = endpoint, inner, failed
        self._in_a_row = 0
        self.gone: str | None = None
        self.reasons: list[str] = []

    def solver(self) -> Solver:
        """Asks one prompt."""

        @solver(name="ask")
        def ask() -> Solver:
            async def solve(state: TaskState, generate: Generate) -> TaskState:
                return await self._ask(state, generate)

            return solve

        return ask()

    async def _ask(self, state: TaskState, generate: Generate) -> TaskState:
        try:
            answered: TaskState = await self._inner(state, generate)
        except Exception as error:
            why = reason(error)
            self.reasons.append(why)
            status = status_of(error)
            if status is not None and 400 <= status < 500 and status not in _SERVERS_FAULT:
                self._in_a_row = 0
            elif (str(state.sample_id), state.epoch) not in self._failed:
                self._in_a_row += 1
            if self._endpoint.server and self.gone is None and self._in_a_row:
                await self._look(why)
            if self._endpoint.server:
                raise _NoAnswer(why) from None  # a trace of the client says nothing
            raise _NoAnswer(why) from error
        self._in_a_row = 0
        return answered

    async def _look(self, why: str) -> None:
        """Find out whether the server is gone."""
        fault = await asyncio.to_thread(server_fault, self._endpoint)
        if fault is None and self._in_a_row >= self._endpoint.concurrency + _FAILURES:
            fault = f"{self._in_a_row} requests in a row failed, the last with {why}"
        self.gone = self.gone or fault

    async def start_task(self, task: Any, samples: Any, epochs: int) -> str:
        return "gone servers"

    async def schedule_sample(self, id: str | int, epoch: int) -> EarlyStop | None:
        return EarlyStop(id=id, epoch=epoch) if self.gone else None

    async def complete_sample(self, id: str | int, epoch: int, scores: Any) -> None:
        pass

    async def complete_task(self) -> dict[str, Any]:
        return {}


def answer(settings: Settings, job: Job, grader: Model | None, display: str) -> tuple[str | None, list[str]]:
    """Answer what a cell lacks; finished answers are taken over.

    Args:
        settings: The evaluation.
        job: The cell.
        grader: The model of the LLM judges.
        display: How inspect_ai shows progress.

    Returns:
        Why it stopped before every prompt was asked, None if it did not; and why prompts failed.

    Raises:
        Interrupted: On Ctrl-C.
    """
    task, best = make_task(job.spec), job.best_log()
    earlier = read_eval_log(str(best), resolve_attachments="full") if best is not None else None
    before = (earlier.samples if earlier is not None else None) or []
    watch = _Watch(job.system, task.solver, {(str(sample.id), sample.epoch) for sample in before if sample.error})
    task = task_with(task, solver=watch.solver(), early_stopping=watch)
    work: Any = task
    if earlier is not None:
        name_graders(earlier)  # the new log names the grader of now
        work = resumed(task, earlier)
    job.folder.mkdir(parents=True, exist_ok=True)
    about = {"cell": identity_hash(job.identity), "grader": grader_hash(settings)}
    model = model_of(settings, job.system, job.mode)
    with closing(job.system, model):
        logs = inspect_eval(
            work,
            model=model,
            model_roles={"grader": grader} if grader is not None else None,
            metadata={**(task.metadata or {}), "axolotl_mote": about},
            epochs=settings.epochs,
            log_dir=str(job.folder),
            log_format="eval",
            log_buffer=1,
            log_realtime=False,
            log_model_api=False,
            fail_on_error=False,
            score_display=False,
            display=display,
            log_level="warning",
            ctl_server=False,
        )
    if not logs or logs[0].status == "cancelled":
        raise Interrupted
    made: EvalLog = logs[0]
    stopped = one_line(made.error.message) if made.status == "error" and made.error is not None else watch.gone
    return stopped, watch.reasons
