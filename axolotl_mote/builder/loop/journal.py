"""Append-only record of every finished call, so that no work is lost and nothing is done twice.

    line 1    {"journal": 1, "config": HASH, "identity": {...}}
    others    {"config": HASH, "call": "QUESTION/STAGE.ROUND.ATTEMPT", "text": ..., "finish": ..., ...}

A call counts as finished once its line is on disk. A last line that a crash tore is cut off when the journal is opened;
damage anywhere else raises an error. One process at a time may hold the journal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from axolotl_mote.builder.clients.calls import Call, Completion
from axolotl_mote.builder.settings import changes, config_hash
from axolotl_mote.files import AppendLog, RowFault, parse_row

_BEGINS = b'{"journal": '
_FIELDS = ("text", "finish", "prompt_tokens", "completion_tokens", "model")


class JournalError(ValueError):
    """The journal belongs to another configuration or is damaged."""


class Journal:
    """The journal of one output folder, open for reading and appending.

    Args:
        path: The file; created if missing.
        identity: What decides the build's outcome; see ``settings.identity``.
        restart: Put an existing journal aside and begin a new one.

    Attributes:
        set_aside: Where ``restart`` put the older journal, or None.

    Raises:
        JournalError: If it was written with another configuration (the message lists the keys that changed), or is
            damaged before its last line.
        FileInUseError: If another process holds it.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, restart: bool = False) -> None:
        self._path, self._config = path, config_hash(identity)
        self.set_aside: Path | None = None
        self._log = AppendLog(path, begins=_BEGINS)
        try:
            if restart and path.stat().st_size:
                self.set_aside = _set_aside(path)
                with self._log:  # the older journal stays locked until the new one is
                    self._log = AppendLog(path, begins=_BEGINS)
            self._completions = self._read(identity)
            self._log.cut_torn_line()
        except BaseException:
            self.close()
            raise

    def get(self, call: Call) -> Completion | None:
        """The recorded completion of a call, or None."""
        return self._completions.get(call.key)

    def completions(self) -> Iterator[tuple[str, Completion]]:
        """All recorded calls as (key, completion)."""
        yield from self._completions.items()

    def add(self, results: Iterable[tuple[Call, Completion]]) -> None:
        """Record finished calls; calls recorded before stay as they are. On return they are on disk."""
        new: dict[str, Completion] = {}
        lines = []
        for call, completion in results:
            if call.key not in self._completions and call.key not in new:
                new[call.key] = completion
                lines.append({"config": self._config, "call": call.key, "seed": call.seed, **vars(completion)})
        if lines:
            self._log.append(lines)
            self._completions |= new

    def close(self) -> None:
        """Release the file; safe to call twice."""
        self._log.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, identity: dict[str, Any]) -> dict[str, Completion]:
        """Check the head, or write it into an empty file; returns the completions by key."""
        records = self._records()
        head = next(records, None)
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
        try:
            return {r["call"]: Completion(**{key: r[key] for key in _FIELDS}) for r in records}
        except KeyError as error:
            raise JournalError(f"{self._path} must hold whole records; one lacks {error}. Move it away.") from error

    def _records(self) -> Iterator[dict[str, Any]]:
        for number, line in self._log.lines():
            record = parse_row(line)
            if isinstance(record, RowFault):
                raise JournalError(
                    f"{self._path} must hold whole records; line {number} is damaged: {record} Or remove that line."
                )
            yield record


def _set_aside(path: Path) -> Path:
    """Rename a journal to the first free ``journal.N.jsonl`` beside it."""
    number = 1
    while (target := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)
    return target
