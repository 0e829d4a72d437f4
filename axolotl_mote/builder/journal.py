"""Append-only record of every finished call, so that no work is lost and nothing is done twice.

    line 1    {"journal": 1, "config": HASH, "identity": {...}}
    others    {"config": HASH, "call": "QUESTION/STAGE.ROUND.ATTEMPT", "text": ..., "finish": ..., ...}

Lines are written whole and synced to disk before anything else happens. A last line that a crash tore is cut off when
the journal is opened; damage anywhere else is an error. One process at a time may hold it. It knows nothing about
chains.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from axolotl_mote.builder.calls import Call, Completion
from axolotl_mote.builder.settings import changes, config_hash


class JournalError(ValueError):
    """The journal belongs to another build, another process, or is damaged."""


class Journal:
    """The journal of one output folder, open for reading and appending.

    Args:
        path: The file; created if missing.
        identity: What decides the build's outcome; see ``settings.identity``.
        restart: Put what the file holds aside and begin anew; ``set_aside`` then says where it went.

    Raises:
        JournalError: If it was written with another configuration (the message lists the keys that changed), is held by
            another process, or is damaged before its last line.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, restart: bool = False) -> None:
        self._path, self._config = path, config_hash(identity)
        self.set_aside: Path | None = None
        self._fd = _locked(path)
        try:
            if restart and os.fstat(self._fd).st_size:
                self.set_aside = _set_aside(path)
                old, self._fd = self._fd, _locked(path)
                os.close(old)
            self._completions = self._read(identity)
        except BaseException:
            self.close()
            raise

    def get(self, call: Call) -> Completion | None:
        """What a call gave, or None if it has not been made."""
        return self._completions.get(call.key)

    def completions(self) -> Iterator[tuple[str, Completion]]:
        """All recorded calls as (key, completion)."""
        yield from self._completions.items()

    def add(self, results: Iterable[tuple[Call, Completion]]) -> None:
        """Record finished calls; calls that are already there are left as they are. On return they are on disk."""
        lines = []
        for call, done in results:
            if call.key in self._completions:
                continue
            self._completions[call.key] = done
            lines.append({"config": self._config, "call": call.key, "seed": call.seed, **vars(done)})
        self._write(lines)

    def close(self) -> None:
        """Release the file; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, identity: dict[str, Any]) -> dict[str, Completion]:
        raw = self._path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.ftruncate(self._fd, len(whole))
        lines = whole.splitlines()
        if not lines:
            self._write([{"journal": 1, "config": self._config, "identity": identity}])
            return {}
        records = [self._parse(number, line) for number, line in enumerate(lines, start=1)]
        head = records[0]
        if "identity" not in head:
            raise JournalError(f"{self._path} must begin with its configuration; got something else. Move it away.")
        if head["config"] != self._config:
            listed = "\n".join(f"  {line}" for line in changes(head["identity"], identity))
            raise JournalError(
                f"{self._path} must continue the configuration it was begun with; these keys changed:\n{listed}\n"
                "Undo the change, choose another output folder, or start over with --restart."
            )
        fields = ("text", "finish", "prompt_tokens", "completion_tokens", "model")
        try:
            return {r["call"]: Completion(**{key: r[key] for key in fields}) for r in records[1:]}
        except KeyError as error:
            raise JournalError(f"{self._path} must hold complete records; one lacks {error}. Move it away.") from error

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise JournalError(
                f"{self._path} must hold JSON lines; line {number} is damaged: {error}. Remove that line."
            ) from error
        if not isinstance(record, dict):
            raise JournalError(f"{self._path} must hold JSON objects; line {number} is none. Remove that line.")
        return record

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        # ASCII JSON: no line separator inside a text can end a line, and lone surrogates survive.
        data = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode("ascii"))
        size = os.fstat(self._fd).st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError:  # a full disk: leave no half line for others to append to
            os.ftruncate(self._fd, size)
            raise


def _locked(path: Path) -> int:
    """Open a file for reading and appending, as the only process that does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise JournalError(f"{path} must be used by one build at a time; another one holds it. Wait for it.") from None
    return fd


def _set_aside(path: Path) -> Path:
    """Rename a journal to the first free ``journal.N.jsonl`` beside it."""
    number = 1
    while (target := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)
    return target
