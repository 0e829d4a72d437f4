"""Files: JSON lines in and out, atomic writes, an append-only log with a lock; digests and versions for records.

Every JSONL file of the project is read by ``read_jsonl``. Every file that must survive a crash is written by
``AtomicFiles``, ``write_atomically`` or ``AppendLog``, and every such folder by ``folder_in_one_rename``. Rows that
memory need not hold go to a ``RowSpool``. Rows are numbered from 1. The module uses the standard library only and does
not depend on chains.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

_DIGEST_BLOCK = 64 * 1024
_SCAN_BLOCK = 64 * 1024
_LINE_BLOCK = 2 * 1024
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_MAX_REPORTED = 50


class RowFault(str):
    """Why a line cannot be read: "the line must be JSON; got ... . Correct the line."."""


class FileInUseError(ValueError):
    """Another process holds the lock of a file."""


# --- reading --------------------------------------------------------------------------------------------------------


def _open_bytes(path: Path) -> IO[bytes]:
    return path.open("rb")


def read_jsonl(
    path: Path, opener: Callable[[Path], AbstractContextManager[Iterable[bytes]]] = _open_bytes
) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
    """Read JSON lines one by one; blank lines are skipped but counted, the byte order mark of some editors is left out.

    Args:
        path: The file.
        opener: Opens it as lines of bytes; replace it to read compressed files.

    Yields:
        Row number, from 1, and the object, or a ``RowFault`` for a line that is not a JSON object in UTF-8.
    """
    with opener(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, parse_row(line)


def parse_row(line: bytes) -> dict[str, Any] | RowFault:
    """The JSON object in a line, or why the line cannot be read."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowFault(f"the line must be UTF-8; got byte {error.object[error.start]:#x}. Convert the file.")
    except json.JSONDecodeError as error:
        return RowFault(f"the line must be JSON; got {error.msg} at column {error.colno}. Correct the line.")
    except ValueError as error:  # a number of thousands of digits
        return RowFault(f"the line must be JSON; got: {error}. Correct the line.")
    except RecursionError:
        return RowFault("the line must be JSON; got brackets that are nested too deeply. Correct the line.")
    if not isinstance(row, dict):
        return RowFault(f"the line must hold a JSON object; got {type(row).__name__}. Write one object per line.")
    return row


def raise_faults(faults: Sequence[str], message: str, error: type[ValueError] = ValueError) -> None:
    """Raise all faults of a file at once, if there are any.

    Args:
        faults: Each with its row, as "row 3: ...".
        message: Begins the error; ``{faults}`` in it stands for their number. At most 50 of them follow it.
        error: What to raise.
    """
    if not faults:
        return
    shown = [f"  {fault}" for fault in faults[:_MAX_REPORTED]]
    if len(faults) > len(shown):
        shown.append(f"  and {len(faults) - len(shown)} more")
    count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
    raise error("\n".join([message.replace("{faults}", count), *shown]))


def sound_rows(
    rows: Iterable[tuple[int, dict[str, Any] | RowFault]],
    message: str,
    check: Callable[[dict[str, Any]], Sequence[str]] = lambda row: (),
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the numbered rows that have no fault, then raise all faults at once.

    Args:
        rows: From ``read_jsonl``.
        message: As for ``raise_faults``.
        check: Gives the faults of a row.

    Raises:
        ValueError: After the last row, if any row has a fault.
    """
    faults: list[str] = []
    for number, row in rows:
        if isinstance(row, RowFault):
            faults.append(f"row {number}: {row}")
        elif found := check(row):
            faults += [f"row {number}: {fault}" for fault in found]
        else:
            yield number, row
    raise_faults(faults, message)


def read_all_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all rows of a JSONL file.

    Raises:
        ValueError: After the last row, if lines hold no JSON object; all of them at once, with their numbers.
    """
    message = f"{path} must hold one JSON object per line; got {{faults}}."
    return (row for _, row in sound_rows(read_jsonl(path), message))


# --- writing --------------------------------------------------------------------------------------------------------


def json_line(row: dict[str, Any]) -> bytes:
    """A row as one line of UTF-8. Unpaired surrogates, which UTF-8 cannot hold, stay escaped.

    Raises:
        ValueError: If its brackets are nested too deeply.
    """
    try:
        return (_spell(row) + "\n").encode()
    except UnicodeEncodeError:
        return (_spell(row, ensure_ascii=True) + "\n").encode()


def _spell(row: dict[str, Any], ensure_ascii: bool = False) -> str:
    try:
        return json.dumps(row, ensure_ascii=ensure_ascii, default=str)
    except RecursionError as error:
        raise ValueError(
            "a row must hold JSON; got brackets that are nested too deeply. Drop that column from the source."
        ) from error


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the path to errors of the disk that lack one, such as "No space left on device"."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class Closing:
    """What is closed at the end of a ``with`` block."""

    def close(self) -> None:
        """Give back what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RowSpool(Closing):
    """Rows in a file without a name; memory holds only their offsets. The file vanishes with the process.

    A row comes back as JSON has it; what JSON cannot spell comes back as its ``str``.

    Args:
        folder: Where the file is; a disk with room for all rows.

    Attributes:
        columns: Every key of any row, in the order of appearance.

    Raises:
        OSError: From any method, if the disk is full; it names the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with _named(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=2**16)  # noqa: SIM115
        self._ends = array("Q", [0])
        self.columns: dict[str, None] = {}

    def append(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self.columns.update(dict.fromkeys(row))
        line = json_line(row)
        with _named(self._folder):
            self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self._ends[index], self._ends[index + 1]
        with _named(self._folder):
            self._file.flush()
            row: dict[str, Any] = json.loads(os.pread(self._file.fileno(), end - start, start))
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Delete the file; safe to call twice."""
        with suppress(OSError):  # what was not written need not be
            self._file.close()


class AtomicFiles:
    """Files that appear together: each is written beside its path and synced to disk; at the end all are renamed.

    If the block raises, or a file cannot be written whole, none of them changes and nothing is left behind.
    """

    def __init__(self) -> None:
        self._staged: dict[Path, Path] = {}

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Write the bytes of a file.

        Raises:
            OSError: If they cannot be written; it names the path.
        """
        path = path.resolve()  # a link stays a link
        path.parent.mkdir(parents=True, exist_ok=True)
        self._staged[path] = staging = path.with_name(f".{path.name}.tmp")
        with _named(path), staging.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())

    def write_jsonl(self, path: Path, rows: RowSpool) -> None:
        """Write rows, each with every column, so that readers with a fixed schema accept the file."""
        whole = ({key: row.get(key) for key in rows.columns} for row in rows)
        self.write(path, ((_spell(row) + "\n").encode("utf-8", "replace") for row in whole))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for path, staging in self._staged.items():
                    os.replace(staging, path)
        finally:
            for staging in self._staged.values():
                staging.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one rename, synced to disk first. Unpaired surrogates become "?"."""
    with AtomicFiles() as files:
        files.write(path, [text.encode("utf-8", "replace")])


@contextmanager
def folder_in_one_rename(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``path`` in one rename; if the block raises, it is removed.

    Args:
        path: The finished folder; it may exist if it is empty.
        replace: Replace it whatever it holds; it is deleted once the new one is there.

    Raises:
        OSError: If ``path`` holds something and ``replace`` is off. If the disk is full, it names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    earlier = staging.with_name(f"{staging.name}.old")
    try:
        with _named(path):
            yield staging
        staging.chmod(0o755)
        if replace and (path.exists() or path.is_symlink()):
            path.rename(earlier)
        try:
            staging.rename(path)
        except OSError:
            if earlier.exists() or earlier.is_symlink():
                earlier.rename(path)
            raise
        if earlier.is_dir() and not earlier.is_symlink():
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            earlier.unlink(missing_ok=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class AppendLog(Closing):
    """A JSONL file that one process at a time appends to, and that survives being killed.

    Opening takes the lock and changes nothing. A last line without its newline is torn: the process died while writing
    it. ``lines`` leaves it out; ``cut_torn_line`` or the first ``append`` cuts it off, once the caller knows that the
    file is its own. ``append`` writes whole lines and returns once they are on disk; if the disk is full, no partial
    line remains.

    Args:
        path: The file; created with its folder if missing.
        begins: How every file of this kind begins.
        clear: Empty it, once it is locked.

    Attributes:
        torn: Whether the last line is torn.

    Raises:
        FileInUseError: If another process holds the file.
        ValueError: If the file holds nothing but a torn line that does not begin like one of this kind.
    """

    def __init__(self, path: Path, *, begins: bytes = b"", clear: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            if clear:
                os.ftruncate(self._fd, 0)
            size = os.fstat(self._fd).st_size
            self._end = self._end_of_whole_lines(size)
            self.torn = self._end < size
            if self.torn and not self._end and not begins.startswith(os.pread(self._fd, len(begins), 0)):
                raise ValueError(f"{path} must be a file that this command wrote; got other content. Move the file.")
        except BaseException:
            self.close()
            raise

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """The whole lines on disk with their numbers, from 1."""
        read = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                read += len(line)
                if read > self._end:
                    return
                yield number, line

    def cut_torn_line(self) -> None:
        """Cut off a torn last line, if there is one."""
        if os.fstat(self._fd).st_size > self._end:
            os.ftruncate(self._fd, self._end)

    def line_at(self, offset: int) -> bytes:
        """The line that begins at an offset; see ``append``."""
        found = bytearray()
        while b"\n" not in found and (block := os.pread(self._fd, _LINE_BLOCK, offset + len(found))):
            found += block
        return bytes(found[: found.find(b"\n") + 1])

    def append(self, rows: Iterable[dict[str, Any]]) -> list[int]:
        """Write rows, one line each, and wait until they are on disk.

        Returns:
            The offset of each line.

        Raises:
            OSError: If they cannot be written; the file is then as it was.
        """
        lines = [json_line(row) for row in rows]
        *offsets, end = accumulate(map(len, lines), initial=self._end)
        data = memoryview(b"".join(lines))
        self.cut_torn_line()
        try:
            with _named(self.path):
                while data:
                    data = data[os.write(self._fd, data) :]
                os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._end)
            raise
        self._end = end
        return offsets

    def close(self) -> None:
        """Release the file; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileInUseError(
                f"{self.path} must be used by one process at a time; another one holds it. Wait for it."
            ) from None

    def _end_of_whole_lines(self, end: int) -> int:
        """Offset behind the last newline before an offset."""
        while end:
            start = max(0, end - _SCAN_BLOCK)
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0


# --- digests and versions -------------------------------------------------------------------------------------------


def folder_digest(path: Path) -> str:
    """Hash of a model folder without reading all its weights: small files whole, large ones by size and 16 blocks.

    It changes when another model is written to the same folder.
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


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Version of each package that is installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
