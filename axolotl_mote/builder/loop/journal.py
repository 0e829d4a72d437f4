"""Append-only record of every finished call, so that no work is lost and nothing is done twice.

    line 1    {"journal": 1, "config": HASH, "identity": {...}}
    others    {"config": HASH, "call": "QUESTION/STAGE.ROUND.ATTEMPT", "text": ..., "finish": ..., ...}

A call counts as finished once its line is on disk. A last line that a crash tore is cut off when the journal is opened;
damage anywhere else raises an error. One process at a time may hold the journal. Memory holds the key of every call and
the offset of its line, about 200 bytes; the texts stay on disk.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from axolotl_mote.builder.clients.calls import Call, Completion
from axolotl_mote.builder.settings import changes, config_hash
from axolotl_mote.files import AppendLog, Closing, RowFault, parse_row

_BEGINS = b'{"journal": '
_FIELDS = ("text", "finish", "prompt_tokens", "completion_tokens", "model")


class JournalError(ValueError):
    """The journal belongs to another configuration or is damaged."""


class Journal(Closing):
    """The journal of one output folder, open for reading and appending.

    Args:
        path: The file; created if missing.
        identity: What decides the build's outcome; see ``settings.identity``.
        restart: Put an existing journal aside and begin a new one.
        on_progress: Called with the number of calls read so far, after every 1,000, while the journal is opened.

    Attributes:
        set_aside: Where ``restart`` put the older journal, or None.

    Raises:
        JournalError: If it was written with another configuration (the message lists the keys that changed), or is
            damaged before its last line.
        FileInUseError: If another process holds it.
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        *,
        restart: bool = False,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._path, self._config, self._on_progress = path, config_hash(identity), on_progress
        self.set_aside: Path | None = None
        self._writing = threading.Lock()
        self._log = AppendLog(path, begins=_BEGINS)
        try:
            if restart and path.stat().st_size:
                self.set_aside = _set_aside(path)
                with self._log:  # the older journal stays locked until the new one is
                    self._log = AppendLog(path, begins=_BEGINS)
            self._offsets = self._read(identity)
            self._log.cut_torn_line()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, call: Call) -> bool:
        return call.key in self._offsets

    def __iter__(self) -> Iterator[str]:
        """The keys of all recorded calls."""
        return iter(self._offsets)

    def get(self, call: Call) -> Completion | None:
        """The recorded completion of a call, or None."""
        offset = self._offsets.get(call.key)
        return None if offset is None else self._completion_at(offset)

    def completions(self) -> Iterator[tuple[str, Completion]]:
        """All recorded calls as (key, completion)."""
        return ((key, self._completion_at(offset)) for key, offset in self._offsets.items())

    def add(self, results: Iterable[tuple[Call, Completion]]) -> None:
        """Record finished calls; calls recorded before stay as they are. On return they are on disk.

        Threads may share a journal.

        Raises:
            OSError: If they cannot be written; then none of them is recorded.
        """
        with self._writing:
            new: dict[str, dict[str, Any]] = {}
            for call, completion in results:
                if call.key not in self._offsets and call.key not in new:
                    new[call.key] = {"config": self._config, "call": call.key, "seed": call.seed, **vars(completion)}
            if new:
                self._offsets.update(zip(new, self._log.append(new.values()), strict=True))

    def add_all(self, other: Journal) -> None:
        """Record what another journal of the same build holds.

        Raises:
            JournalError: If a call was recorded before with another result; nothing is recorded then.
            OSError: If they cannot be written; what was written before stays.
        """
        for key in other:
            if key in self._offsets and self._record_at(self._offsets[key]) != other._record_at(other._offsets[key]):
                raise JournalError(
                    f"{self._path} must agree with {other._path}; they have two results of {key}. That shard was begun "
                    "anew: add --restart."
                )
        keys = [key for key in other if key not in self._offsets]
        for start in range(0, len(keys), 1000):
            lines = {key: other._record_at(other._offsets[key]) for key in keys[start : start + 1000]}
            with self._writing:
                self._offsets.update(zip(lines, self._log.append(lines.values()), strict=True))

    def close(self) -> None:
        """Release the file; safe to call twice."""
        self._log.close()

    def _read(self, identity: dict[str, Any]) -> dict[str, int]:
        """Check the head, or write it into an empty file; returns the offset of each call's line, by key."""
        records = self._records()
        _, head = next(records, (0, None))
        if head is None:
            self._log.append([{"journal": 1, "config": self._config, "identity": identity}])
            return {}
        if "identity" not in head:
            raise JournalError(f"{self._path} must begin with its configuration; got something else. Move it away.")
        if head["config"] != self._config:
            listed = "\n".join(f"  {line}" for line in changes(head["identity"], identity))
            raise JournalError(
                f"{self._path} must continue with the configuration that began it; these keys changed:\n{listed}\n"
                "Undo the change, choose another output folder, or start over with --restart."
            )
        offsets = {}
        for offset, record in records:
            lacking = [key for key in ("call", *_FIELDS) if key not in record]
            if lacking:
                raise JournalError(f"{self._path} must hold whole records; one lacks {lacking[0]!r}. Move it away.")
            if record.get("config", self._config) != self._config:
                raise JournalError(f"{self._path} must hold records of one configuration; got another's. Move it away.")
            offsets[record["call"]] = offset
            if len(offsets) % 1000 == 0:
                self._on_progress(len(offsets))
        return offsets

    def _completion_at(self, offset: int) -> Completion:
        record = self._record_at(offset)
        return Completion(**{key: record[key] for key in _FIELDS})

    def _record_at(self, offset: int) -> dict[str, Any]:
        record = parse_row(self._log.line_at(offset))
        if isinstance(record, RowFault):
            raise JournalError(f"{self._path} must not change while a build runs; got: {record} Start the build again.")
        return record

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Offset and content of every line."""
        offset = 0
        for number, line in self._log.lines():
            record = parse_row(line)
            if isinstance(record, RowFault):
                raise JournalError(
                    f"{self._path} must hold whole records; line {number} is damaged: {record} Or remove that line."
                )
            yield offset, record
            offset += len(line)


class GroupCommit:
    """Records the calls of many tasks: all that finish while one sync is under way share the next one.

    The sync runs in a thread, so that the other tasks go on meanwhile.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal, self._turn = journal, asyncio.Lock()
        self._waiting: list[tuple[Call, Completion]] = []

    async def add(self, call: Call, completion: Completion) -> None:
        """Record a finished call. On return it is on disk.

        Raises:
            OSError: As ``Journal.add``.
        """
        self._waiting.append((call, completion))
        async with self._turn:  # the first task of those that wait writes for all of them
            if call not in self._journal:
                group = list(self._waiting)
                await asyncio.to_thread(self._journal.add, group)
                del self._waiting[: len(group)]

    def flush(self) -> None:
        """Record what still waits, now: after its tasks were canceled."""
        self._journal.add(self._waiting)
        self._waiting.clear()


def _set_aside(path: Path) -> Path:
    """Rename a journal to the first free ``journal.N.jsonl`` beside it."""
    number = 1
    while (target := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)
    return target
