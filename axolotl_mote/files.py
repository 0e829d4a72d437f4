"""Files: JSON lines in and out, atomic writes, an append-only log with a lock, a digest of a model folder.

Every JSONL file of the project is read by ``read_jsonl`` and every file that must survive a crash is written by
``write_atomically`` or ``AppendLog``. Rows are numbered from 1. Standard library only; no knowledge of chains.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

_DIGEST_BLOCK = 64 * 1024
_SCAN_BLOCK = 64 * 1024
_MAX_REPORTED = 50


class RowFault(str):
    """Why a line holds no row: "the line must be JSON; got ... . Correct the line."."""


class FileInUseError(ValueError):
    """Another process holds the lock of a file."""


# --- reading --------------------------------------------------------------------------------------------------------


def _open_bytes(path: Path) -> IO[bytes]:
    return path.open("rb")


def read_jsonl(
    path: Path, opener: Callable[[Path], AbstractContextManager[Iterable[bytes]]] = _open_bytes
) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
    """Read JSON lines one by one; blank lines are skipped but counted.

    Args:
        path: The file.
        opener: Opens it as lines of bytes; replace it to read compressed files.

    Yields:
        Row number, from 1, and the object, or a ``RowFault`` for a line that is not a JSON object in UTF-8.
    """
    with opener(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, parse_row(line)


def parse_row(line: bytes) -> dict[str, Any] | RowFault:
    """The JSON object in a line, or why there is none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowFault(f"the line must be UTF-8; got byte {error.object[error.start]:#x}. Convert the file.")
    except json.JSONDecodeError as error:
        return RowFault(f"the line must be JSON; got {error.msg} at column {error.colno}. Correct the line.")
    except RecursionError:
        return RowFault("the line must be JSON of sane depth; got too many nested brackets. Correct the line.")
    if not isinstance(row, dict):
        return RowFault(f"the line must hold a JSON object; got {type(row).__name__}. Write one object per line.")
    return row


def list_faults(faults: Sequence[str]) -> str:
    """Faults as an indented list, at most 50 of them, for the end of a message."""
    shown = [f"  {fault}" for fault in faults[:_MAX_REPORTED]]
    if len(faults) > len(shown):
        shown.append(f"  and {len(faults) - len(shown)} more")
    return "\n".join(shown)


def read_all_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file.

    Raises:
        ValueError: If lines hold no JSON object; all of them at once, with their numbers.
    """
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for number, row in read_jsonl(path):
        if isinstance(row, RowFault):
            faults.append(f"row {number}: {row}")
        else:
            rows.append(row)
    if faults:
        raise ValueError(f"{path} must hold one JSON object per line; got {len(faults)} faults.\n{list_faults(faults)}")
    return rows


# --- writing --------------------------------------------------------------------------------------------------------


def json_line(row: dict[str, Any]) -> bytes:
    """A row as one line of UTF-8. Unpaired surrogates, which UTF-8 cannot hold, stay escaped."""
    try:
        return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row, default=str) + "\n").encode()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one rename, synced to disk first. Unpaired surrogates become "?"."""
    staging = path.with_name(f".{path.name}.tmp")
    with staging.open("wb") as file:
        file.write(text.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows atomically, each with every column, so that readers with a fixed schema accept the file."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = (json.dumps({key: row.get(key) for key in columns}, ensure_ascii=False, default=str) for row in rows)
    write_atomically(path, "".join(line + "\n" for line in lines))


class AppendLog:
    """A JSONL file that one process at a time appends to, and that survives being killed.

    Opening takes the lock and cuts off a last line without its newline (the process died while writing it). ``append``
    writes whole lines and returns once they are on disk; if the disk is full, no half line stays behind.

    Args:
        path: The file; created with its folder if missing.
        clear: Empty it, once it is locked.

    Attributes:
        torn: Whether a torn last line was cut off.

    Raises:
        FileInUseError: If another process holds the file.
    """

    def __init__(self, path: Path, *, clear: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            if clear:
                os.ftruncate(self._fd, 0)
            self.torn = self._cut_torn_line()
        except BaseException:
            self.close()
            raise

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines on disk with their numbers, from 1."""
        with self.path.open("rb") as file:
            yield from enumerate(file, start=1)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows, one line each, and wait until they are on disk.

        Raises:
            OSError: If they cannot be written; the file is then as it was.
        """
        data = memoryview(b"".join(map(json_line, rows)))
        size = os.fstat(self._fd).st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, size)
            raise

    def close(self) -> None:
        """Release the file; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileInUseError(
                f"{self.path} must be used by one process at a time; another one holds it. Wait for it."
            ) from None

    def _cut_torn_line(self) -> bool:
        """Truncate the file behind its last newline."""
        size = end = os.fstat(self._fd).st_size
        while end:
            start = max(0, end - _SCAN_BLOCK)
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end == size:
            return False
        os.ftruncate(self._fd, end)
        return True


# --- digests --------------------------------------------------------------------------------------------------------


def folder_digest(path: Path) -> str:
    """Hash of a model folder without reading all its weights: small files whole, large ones by size and 16 blocks.

    It tells that another model lies where the last run found one.
    """
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            if size < 16 * 2**20:
                digest.update(content.read())
                continue
            for block in range(16):
                content.seek(block * (size - _DIGEST_BLOCK) // 15)
                digest.update(content.read(_DIGEST_BLOCK))
    return digest.hexdigest()[:16]
