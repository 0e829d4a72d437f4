"""Drives the loop with clients and journal, then writes the output.

With a local model, questions go in fixed groups and every wave of a group in fixed batches, so that a resumed run forms
the very same batches. A batch of which any text is missing in the journal is generated again as a whole. With servers
only, every question runs on its own, as fast as the servers answer.

The journal is the only state. Whenever a run ends, and whatever ended it, chains.jsonl, rejected.jsonl, manifest.json
and statistics.html are written from all that the journal holds, in the order of the questions. So they hold every
finished chain, also of questions that this run did not reach.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from axolotl_mote.builder.clients.calls import (
    BudgetMeter,
    BudgetReached,
    Call,
    CallPostponed,
    Completion,
    NoServerResponding,
)
from axolotl_mote.builder.loop.backlog import Backlog
from axolotl_mote.builder.loop.generator import ChainGenerator, Outcome, generate_chain_calls
from axolotl_mote.builder.loop.journal import GroupCommit, Journal
from axolotl_mote.builder.loop.replay import replay
from axolotl_mote.builder.output.results import RunRecord, dropped_row, set_aside, write_results
from axolotl_mote.builder.settings import STAGES, LocalModel, ServerModel, Settings, identity
from axolotl_mote.builder.shards import JOURNAL, Shard, journals_of_shards
from axolotl_mote.builder.texts.prompts import Prompts
from axolotl_mote.builder.texts.questions import screen_questions
from axolotl_mote.chain.questions import Question
from axolotl_mote.files import RowSpool

if TYPE_CHECKING:
    from axolotl_mote.builder.clients.local import LocalClient
    from axolotl_mote.builder.clients.server import ServerClient

log = logging.getLogger(__name__)

_T = TypeVar("_T")

GROUP_BATCHES = 8
"""Batches in a group of questions: enough to fill the later, smaller waves, and few enough that chains finish early."""


@dataclass
class Status:
    """Where a run stands; passed to the progress callback."""

    total: int
    kept: int = 0
    rejected: int = 0
    postponed: int = 0
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
        set_aside: Where an older journal and older results are now.
    """

    counts: dict[str, Any]
    stopped: str | None
    seconds: float
    requests: int
    tokens: int
    set_aside: Sequence[str] = ()


def build(
    settings: Settings,
    *,
    restart: bool = False,
    shard: Shard | None = None,
    merge: bool = False,
    on_progress: Callable[[Status], None] = lambda _: None,
    on_count: Callable[[str, int], None] = lambda what, count: None,
) -> BuildReport:
    """Build a chain data set, or continue one.

    Args:
        settings: The build.
        restart: Put an existing journal aside and begin a new one.
        shard: Build this share of the questions, in a folder of its own below the output folder.
        merge: Take over what the journals of all shards hold, call no model, and write the results of the whole build.
        on_progress: Called after every question.
        on_count: Called with what is counted and its number so far: "rows read" while questions are read, "calls read
            from the journal" while it is opened, "results collected" once all calls are done.

    Returns:
        Counts and costs. Ctrl-C, a used-up budget and servers that do not answer end a run early and cleanly;
        ``stopped`` holds the reason.

    Raises:
        ValueError: If questions, templates or models cannot be used, or the journal belongs to another configuration or
            is in use.
        FatalCallError: If a server rejects every request; earlier work is written.
    """
    started = time.time()
    prompts = Prompts(settings.active_specs(), settings.prompts, settings.hygiene.control_tokens)
    parts = journals_of_shards(settings.output) if merge else []
    if shard is not None:
        settings = settings.model_copy(update={"output": shard.folder(settings.output)})
    folder = settings.output
    folder.mkdir(parents=True, exist_ok=True)
    with Backlog(folder) as questions, RowSpool(folder) as dropped:
        _load(settings, shard, questions, dropped, partial(on_count, "rows read"))
        reading = partial(on_count, "calls read from the journal")
        what = identity(settings, prompts.hashes)
        with ExitStack() as held:
            shards = [held.enter_context(Journal(path, what, on_progress=reading)) for path in parts]
            # Opened last: a shard that cannot be merged leaves nothing behind.
            journal = held.enter_context(Journal(folder / JOURNAL, what, restart=restart, on_progress=reading))
            for part in shards:
                journal.add_all(part)
            aside = [journal.set_aside] if journal.set_aside else []
            chains = folder / "chains.jsonl"
            if not len(journal) and chains.exists() and chains.stat().st_size:  # of another journal
                aside += set_aside(folder)
            run = _Run(settings, prompts, journal, questions, on_progress)
            try:
                if not merge:
                    run.execute()
            finally:
                budget = run.budget
                record = RunRecord(started, time.time() - started, budget.requests, budget.tokens, run.stopped)
                writing = partial(on_count, "results collected")
                counts = write_results(settings, prompts, journal, questions, dropped, record, on_progress=writing)
    moved = [str(path) for path in aside]
    return BuildReport(counts, run.stopped, record.seconds, record.requests, record.tokens, moved)


def _load(
    settings: Settings,
    shard: Shard | None,
    questions: Backlog,
    dropped: RowSpool,
    on_rows_read: Callable[[int], None],
) -> None:
    """Read the questions of a build, or of one share, and the rows it cannot use."""
    rows = screen_questions(
        settings.questions, settings.exclude, settings.deduplicate, settings.seed, on_progress=on_rows_read
    )
    for row in rows:
        if isinstance(row, Question):
            if shard is None or shard.owns(row):
                questions.add(row)
        else:
            dropped.append(dropped_row(row))


@dataclass
class _Run:
    """One run over all questions; ``stopped`` says why it ended early, if it did."""

    settings: Settings
    prompts: Prompts
    journal: Journal
    questions: Backlog
    on_progress: Callable[[Status], None]
    stopped: str | None = None

    def __post_init__(self) -> None:
        self._commits = GroupCommit(self.journal)
        self.budget = BudgetMeter(self.settings.budget.requests, self.settings.budget.tokens)
        self._local: dict[str, LocalClient] = {}
        self._servers: dict[str, ServerClient] = {}
        self._status = Status(len(self.questions))

    def execute(self) -> None:
        """Run ``go``; Ctrl-C is a reason to stop, not an error."""
        try:
            asyncio.run(self.go())
        except KeyboardInterrupt:
            self.stopped = "interrupted"
        except Exception as error:
            self.stopped = str(error)
            raise

    async def go(self) -> None:
        """Build every chain whose outcome the journal and the clients can give."""
        specs = self.settings.active_models().values()
        batch_sizes = [spec.batch_size for spec in specs if isinstance(spec, LocalModel)]
        self.on_progress(self._status)
        try:
            if batch_sizes:
                for group in _chunks(range(len(self.questions)), GROUP_BATCHES * max(batch_sizes)):
                    if self.stopped is None:
                        await self._build_in_waves([self.questions[index] for index in group])
            else:
                await self._build_one_by_one(
                    sum(spec.concurrency * len(spec.base_urls) for spec in specs if isinstance(spec, ServerModel))
                )
        finally:
            self._commits.flush()
            for server in self._servers.values():
                await server.aclose()

    # --- with a local model: waves of batches -----------------------------------------------------------------------

    async def _build_in_waves(self, group: Sequence[Question]) -> None:
        chains = {q.id: generate_chain_calls(q, self.settings, self.prompts) for q in group}
        pending = {name: next(chain) for name, chain in chains.items()}
        while pending and self.stopped is None:
            results: dict[str, Completion] = {}
            for stage in STAGES:
                calls = [call for call in pending.values() if call.stage == stage]
                if calls:
                    results.update(await self._answer_wave(calls, stage))
            following = {name: self._advance(chains[name], completion) for name, completion in results.items()}
            # The order decides the batches: keep that of the questions, whatever order the stages were answered in.
            pending = {q.id: call for q in group if (call := following.get(q.id)) is not None}

    async def _answer_wave(self, calls: list[Call], stage: str) -> dict[str, Completion]:
        """Completions by question id; calls that were postponed or stopped are missing."""
        spec = self.settings.models[self.settings.stage(stage).model]
        results: dict[str, Completion] = {}
        if isinstance(spec, LocalModel):
            for batch in _chunks(calls, spec.batch_size):
                if self.stopped is None:
                    results.update(await self._answer_batch(batch, stage, spec))
            return results

        async def answer(call: Call) -> None:
            completion = await self._answer(call)
            if completion is not None:
                results[call.question_id] = completion

        await _run_all(answer(call) for call in calls)
        return results

    async def _answer_batch(self, batch: Sequence[Call], stage: str, spec: LocalModel) -> dict[str, Completion]:
        """From the journal if it holds the whole batch, else from the model; empty if the run stops."""
        await asyncio.sleep(0)  # Ctrl-C can interrupt between two batches
        if any(call not in self.journal for call in batch):
            settings = self.settings.stage(stage)
            try:
                done = self._local_client(settings.model, spec).complete_batch(batch, settings)
            except BudgetReached as error:
                self.stopped = str(error)
                return {}
            self.journal.add(zip(batch, done, strict=True))
        return {call.question_id: completion for call in batch if (completion := self.journal.get(call)) is not None}

    # --- with servers: every question on its own --------------------------------------------------------------------

    async def _build_one_by_one(self, workers: int) -> None:
        waiting = iter(self.questions)

        async def work() -> None:
            for question in waiting:
                if self.stopped is None:
                    await self._build_one(question)

        await _run_all(work() for _ in range(min(workers, len(self.questions))))

    async def _build_one(self, question: Question) -> None:
        await asyncio.sleep(0)  # Ctrl-C can interrupt between two questions
        recorded = replay(question, self.settings, self.prompts, self.journal)
        if recorded is not None:
            self._count(recorded)
            return
        chain = generate_chain_calls(question, self.settings, self.prompts)
        call: Call | None = next(chain)
        while call is not None:
            completion = await self._answer(call)
            if completion is None:
                return
            call = self._advance(chain, completion)

    async def _answer(self, call: Call) -> Completion | None:
        """From the journal or a server; None if the call was postponed or the run stops."""
        recorded = self.journal.get(call)
        if recorded is not None:
            return recorded
        if self.stopped is not None:
            return None
        stage = self.settings.stage(call.stage)
        try:
            completion = await self._server_client(stage.model).complete(call, stage)
        except (BudgetReached, NoServerResponding) as error:
            self.stopped = self.stopped or str(error)
            return None
        except CallPostponed as error:
            log.warning("postponed to the next run: %s", error)
            self._status.postponed += 1
            self.on_progress(self._status)
            return None
        await self._commits.add(call, completion)
        return completion

    # --- both -------------------------------------------------------------------------------------------------------

    def _advance(self, chain: ChainGenerator, completion: Completion) -> Call | None:
        """The next call of a chain, or None once it is finished."""
        try:
            return chain.send(completion)
        except StopIteration as end:
            self._count(end.value)
        return None

    def _count(self, outcome: Outcome) -> None:
        """Show that a question is finished."""
        self._status.kept += outcome.reason is None
        self._status.rejected += outcome.reason is not None
        self._status.requests, self._status.tokens = self.budget.requests, self.budget.tokens
        self.on_progress(self._status)

    def _local_client(self, name: str, spec: LocalModel) -> LocalClient:
        """The client of a model, made when first needed: a finished build loads no model."""
        from axolotl_mote.builder.clients.local import LocalClient

        if name not in self._local:
            self._local[name] = LocalClient(spec, self.budget)
        return self._local[name]

    def _server_client(self, name: str) -> ServerClient:
        """The client of a model, made when first needed: a finished build needs no API key."""
        from axolotl_mote.builder.clients.server import ServerClient

        spec = self.settings.models[name]
        if name not in self._servers and isinstance(spec, ServerModel):
            stages = {stage for stage in STAGES if self.settings.stage(stage).model == name}
            answered = any(key.rpartition("/")[2].split(".")[0] in stages for key in self.journal)
            self._servers[name] = ServerClient(spec, self.budget, answered)
        return self._servers[name]


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


async def _run_all(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first failure cancels the others and is raised itself, not as a group."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
