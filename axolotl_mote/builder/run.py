"""Drives the loops with clients and journal, and writes the results.

With a local model, questions go in fixed groups and every wave of a group in fixed batches, so that a resumed run forms
the very same batches; a batch of which any text is missing in the journal is generated again as a whole. With servers
only, every question runs on its own, as fast as the servers answer.

The journal is the only state. chains.jsonl, rejected.jsonl, manifest.json and statistics.html are written from it
whenever a run ends, in the order of the questions, each in one rename.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from axolotl_mote.builder.calls import (
    BudgetMeter,
    BudgetReached,
    Call,
    CallPutOff,
    Completion,
    FatalCallError,
    ServersSilent,
)
from axolotl_mote.builder.journal import Journal
from axolotl_mote.builder.loop import Growth, Outcome, grow_chain
from axolotl_mote.builder.output import RunRecord, write_results
from axolotl_mote.builder.prompts import Prompts
from axolotl_mote.builder.questions import Question, load_questions
from axolotl_mote.builder.settings import STAGES, LocalModel, ServerModel, Settings, Stage, identity

if TYPE_CHECKING:
    from axolotl_mote.builder.local import LocalClient
    from axolotl_mote.builder.server import ServerClient

log = logging.getLogger(__name__)

_T = TypeVar("_T")

GROUP_BATCHES = 8
"""Batches in a group of questions: large enough to fill the later, smaller waves, small enough to see chains finish."""


@dataclass
class Status:
    """Where a run stands; handed to the progress callback."""

    total: int
    kept: int = 0
    rejected: int = 0
    put_off: int = 0
    requests: int = 0
    tokens: int = 0

    @property
    def done(self) -> int:
        """Questions with an outcome."""
        return self.kept + self.rejected


@dataclass
class BuildReport:
    """What a run leaves behind.

    Attributes:
        counts: As in the manifest: questions, dropped, kept, rejected, pending, forms, reasons, verdicts, defects.
        stopped: Why the run ended early, or None.
        seconds, requests, tokens: Of this run.
        set_aside: Where an older journal went with ``restart``.
    """

    counts: dict[str, Any]
    stopped: str | None
    seconds: float
    requests: int
    tokens: int
    set_aside: str | None = None


def build(
    settings: Settings, *, restart: bool = False, on_progress: Callable[[Status], None] = lambda _: None
) -> BuildReport:
    """Build a chain data set, or go on with one.

    Args:
        settings: The build.
        restart: Put an existing journal aside and begin anew.
        on_progress: Called after every question.

    Returns:
        Counts and costs. Ctrl-C, a used-up budget and servers that do not answer end a run early and cleanly;
        ``stopped`` says so.

    Raises:
        ValueError: If questions, templates or models cannot be used, or the journal belongs to another configuration.
        FatalCallError: If a server turns every request down; what was done before is written.
    """
    started = time.time()
    prompts = Prompts(settings.active_specs(), settings.prompts)
    questions, dropped = load_questions(settings.questions, settings.exclude, settings.deduplicate, settings.seed)
    settings.output.mkdir(parents=True, exist_ok=True)
    path = settings.output / "journal.jsonl"
    stopped: str | None = None
    fatal: FatalCallError | None = None
    with Journal(path, identity(settings, prompts.hashes), restart=restart) as journal:
        run = _Run(settings, prompts, journal, questions, on_progress)
        try:
            asyncio.run(run.go())
            stopped = run.stopped
        except KeyboardInterrupt:
            stopped = "interrupted"
        except FatalCallError as error:
            stopped, fatal = str(error), error
        record = RunRecord(started, time.time() - started, run.budget.requests, run.budget.tokens, stopped)
        counts = write_results(settings, prompts, journal, questions, dropped, run.outcomes, record)
    if fatal is not None:
        raise fatal
    aside = str(journal.set_aside) if journal.set_aside else None
    return BuildReport(counts, stopped, record.seconds, record.requests, record.tokens, aside)


@dataclass
class _Run:
    """One run over all questions; ``outcomes`` fills up by question id."""

    settings: Settings
    prompts: Prompts
    journal: Journal
    questions: list[Question]
    on_progress: Callable[[Status], None]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    stopped: str | None = None

    def __post_init__(self) -> None:
        self.budget = BudgetMeter(self.settings.budget.requests, self.settings.budget.tokens)
        self._clients: dict[str, LocalClient | ServerClient] = {}
        self._status = Status(len(self.questions))

    async def go(self) -> None:
        """Grow every chain whose outcome the journal and the clients can give."""
        specs = self.settings.active_models().values()
        local = [spec for spec in specs if isinstance(spec, LocalModel)]
        self.on_progress(self._status)
        try:
            if local:
                size = GROUP_BATCHES * max(spec.batch_size for spec in local)
                for group in _chunks(self.questions, size):
                    if self.stopped is None:
                        await self._grow_in_waves(group)
            else:
                await self._grow_freely(
                    sum(s.concurrency * len(s.base_urls) for s in specs if isinstance(s, ServerModel))
                )
        finally:
            for client in self._clients.values():
                if hasattr(client, "aclose"):
                    await client.aclose()

    async def _grow_in_waves(self, group: Sequence[Question]) -> None:
        growths = {q.id: grow_chain(q, self.settings, self.prompts) for q in group}
        pending = {name: next(growth) for name, growth in growths.items()}
        while pending and self.stopped is None:
            results: dict[str, Completion] = {}
            for stage in STAGES:
                calls = [call for call in pending.values() if call.stage == stage]
                if calls:
                    results.update(await self._answer_wave(calls, stage))
            calls_of_next_wave = {}
            for name, completion in results.items():
                call = self._advance(growths[name], completion)
                if call is not None:
                    calls_of_next_wave[name] = call
            # Order decides the batches: keep that of the questions, whatever order the stages were answered in.
            pending = {q.id: calls_of_next_wave[q.id] for q in group if q.id in calls_of_next_wave}

    async def _answer_wave(self, calls: list[Call], stage: str) -> dict[str, Completion]:
        """Completions by question id; questions that were put off or stopped are missing."""
        spec = self.settings.models[self._stage(stage).model]
        results: dict[str, Completion] = {}
        if isinstance(spec, LocalModel):
            for batch in _chunks(calls, spec.batch_size):
                if self.stopped is None:
                    results.update(await self._answer_batch(batch, stage))
            return results

        async def one(call: Call) -> None:
            completion = await self._answer(call)
            if completion is not None:
                results[call.question_id] = completion

        await _all(one(call) for call in calls)
        return results

    async def _answer_batch(self, batch: Sequence[Call], stage: str) -> dict[str, Completion]:
        if any(self.journal.get(call) is None for call in batch):
            await asyncio.sleep(0)  # lets Ctrl-C in between two batches
            client: Any = self._client(self._stage(stage).model)
            try:
                done = client.complete_batch(batch, self._stage(stage))
            except BudgetReached as error:
                self.stopped = str(error)
                return {}
            self.journal.add(zip(batch, done, strict=True))
        return {call.question_id: completion for call in batch if (completion := self.journal.get(call)) is not None}

    async def _grow_freely(self, workers: int) -> None:
        waiting = iter(self.questions)

        async def work() -> None:
            for question in waiting:
                if self.stopped is None:
                    await self._grow(grow_chain(question, self.settings, self.prompts))

        await _all(work() for _ in range(min(workers, len(self.questions))))

    async def _grow(self, growth: Growth) -> None:
        call: Call | None = next(growth)
        while call is not None:
            completion = await self._answer(call)
            if completion is None:
                return
            call = self._advance(growth, completion)

    async def _answer(self, call: Call) -> Completion | None:
        """From the journal or a server; None if the call was put off or the run stops."""
        recorded = self.journal.get(call)
        if recorded is not None:
            return recorded
        if self.stopped is not None:
            return None
        stage = self._stage(call.stage)
        client: Any = self._client(stage.model)
        try:
            completion: Completion = await client.complete(call, stage)
        except (BudgetReached, ServersSilent) as error:
            self.stopped = self.stopped or str(error)
            return None
        except CallPutOff as error:
            log.warning("put off to the next run: %s", error)
            self._status.put_off += 1
            self.on_progress(self._status)
            return None
        self.journal.add([(call, completion)])
        return completion

    def _advance(self, growth: Growth, completion: Completion) -> Call | None:
        """The next call of a growth; None once it is finished, whose outcome is then stored."""
        try:
            return growth.send(completion)
        except StopIteration as end:
            outcome: Outcome = end.value
        self.outcomes[outcome.question.id] = outcome
        self._status.kept += outcome.reason is None
        self._status.rejected += outcome.reason is not None
        self._status.requests, self._status.tokens = self.budget.requests, self.budget.tokens
        self.on_progress(self._status)
        return None

    def _stage(self, name: str) -> Stage:
        stage: Stage = getattr(self.settings.stages, name)
        return stage

    def _client(self, name: str) -> LocalClient | ServerClient:
        """Clients are made when first needed: a finished build loads no model."""
        if name not in self._clients:
            spec = self.settings.models[name]
            if isinstance(spec, LocalModel):
                from axolotl_mote.builder.local import LocalClient

                self._clients[name] = LocalClient(spec, self.budget)
            else:
                from axolotl_mote.builder.server import ServerClient

                stages = {stage for stage in STAGES if self._stage(stage).model == name}
                answered = any(key.rpartition("/")[2].split(".")[0] in stages for key, _ in self.journal.completions())
                self._clients[name] = ServerClient(spec, self.budget, answered)
        return self._clients[name]


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


async def _all(coroutines: Iterator[Any]) -> None:
    """Run all; the first failure cancels the others and is raised itself, not as a group."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
