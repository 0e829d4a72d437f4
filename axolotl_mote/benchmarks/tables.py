"""Rows of data files: JSONL, JSON, CSV, TSV and Parquet, packed or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from axolotl_mote.files import read_jsonl, sound_rows

Row = tuple[int, dict[str, Any]]
"""Number of a row, from 1, and its columns."""


def read_file(path: Path, key: str = "path") -> Iterator[Row] | None:
    """The rows of a file, in order; None if the path names no file of data, and so may name a data set.

    Args:
        path: A file ending in .jsonl, .ndjson, .json, .csv, .tsv (.gz may follow) or .parquet, in any case.
        key: What the user calls the path, for errors.

    Raises:
        ValueError: If the file is missing or of another kind. Later, if it holds something other than rows; all such
            lines of a JSONL file at once.
    """
    kind = (Path(path.stem).suffix if _is_gzip(path) else path.suffix).lower()
    if kind in _READERS and path.is_file():
        return _READERS[kind](path)
    if kind in _READERS:
        raise ValueError(f"{key} must be an existing file; got {path}. Correct the path.")
    if path.is_file():
        raise ValueError(f"{key} must end in {', '.join(_READERS)}, or name a data set; got {path}. Convert the file.")
    return None


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


@contextmanager
def _open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file as bytes and decompress it if it ends in .gz."""
    try:
        with gzip.open(path) if _is_gzip(path) else path.open("rb") as file:
            yield file  # type: ignore[misc]  # GzipFile is not an IO in typeshed
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} must be a whole gzip file; got: {error}. Download it again.") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    return sound_rows(read_jsonl(path, _open_bytes), f"{path} must hold one JSON object per line; got {{faults}}.")


def _read_json(path: Path) -> Iterator[Row]:
    with _open_bytes(path) as file:
        content = file.read()
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise ValueError(
            f"{path} must hold a JSON list of objects; got: {error}. Use .jsonl for one object per line."
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"{path} must hold a JSON list of objects; got brackets that are nested too deeply. Correct the file."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{path} must hold a JSON list of objects; got something else. Use .jsonl for one object per line."
        )
    yield from enumerate(rows, start=1)


def _read_csv(path: Path, mark: str = ",") -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # of the whole process; strict mode finds a quote that is never closed
    try:
        with _open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines, delimiter=mark, strict=True), start=1):
                if any(row.pop(None, ())):  # the fields without a column
                    raise ValueError(
                        f"{path} must have a column for every field; got more fields in row {number}. Quote the fields."
                    )
                yield number, row
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8; got byte {error.object[error.start]:#x}. Convert the file, with iconv for example."
        ) from error
    except csv.Error as error:
        raise ValueError(f"{path} must be a CSV file; got: {error}. Correct its quotes.") from error


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, "\t")


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield from enumerate((row for batch in file.iter_batches() for row in batch.to_pylist()), start=1)
    except ArrowException as error:
        raise ValueError(f"{path} must be a Parquet file; got: {error}. Download it again.") from error


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
"""By the end of a file's name; all but Parquet may be followed by .gz."""
