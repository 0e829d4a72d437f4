"""Files of questions: every kind, and what is wrong with them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from axolotl_mote.builder.settings import QuestionSource
from axolotl_mote.builder.texts.sources import read_rows

ROW = {"prompt": "Why is tea so bitter?", "topic": "tea"}


def rows(path: Path) -> list[dict[str, object]]:
    return [row for _, row in read_rows(QuestionSource(path=str(path)))]


@pytest.mark.parametrize(
    "name", ["q.JSONL", "q.Json", "q.CSV", "q.tsv", "q.TSV", "q.jsonl.GZ", "q.tsv.gz", "q.ndjson", "q.PARQUET"]
)
def test_kinds_in_any_spelling(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    kind = name.lower()
    if "parquet" in kind:
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist([ROW]), path)
    else:
        mark = "\t" if ".tsv" in kind else ","
        table = f"prompt{mark}topic\n{ROW['prompt']}{mark}{ROW['topic']}\n"
        text = (
            json.dumps([ROW]) if kind.endswith(".json") else table if mark == "\t" or "csv" in kind else json.dumps(ROW)
        )
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
    assert rows(path) == [ROW]


def test_a_field_of_any_length_is_read(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "q.csv").write_text(f'prompt,topic\n"{long}\n{long}",tea\n')
    assert rows(tmp_path / "q.csv") == [{"prompt": f"{long}\n{long}", "topic": "tea"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", "prompt\ncafé\n".encode("latin-1"), r"q\.csv must be UTF-8; got byte 0xe9\. Convert the file"),
        ("q.tsv", "prompt\tb\na\tb\n".encode("utf-16"), r"q\.tsv must be UTF-8; got byte 0xff\. Convert the file"),
        ("q.json", '[{"prompt": "café"}]'.encode("latin-1"), r"q\.json must hold a JSON list of objects; got: .*0xe9"),
        ("q.json", b"[" * 100_000, r"q\.json must hold a JSON list of objects; got brackets that are nested too deep"),
        ("q.json", b"[" + b"1" * 5000 + b"]", r"q\.json must hold a JSON list of objects"),
        ("q.jsonl", b'{"a": ' + b"[" * 100_000, r"(?s)q\.jsonl must hold .*row 1: .*nested too deeply"),
        ("q.parquet", b"PAR1 and no table", r"q\.parquet must be a Parquet file; got"),
        (
            "q.txt",
            b"Why is tea so bitter?\n",
            r"questions.path must end in \.jsonl, .*; got .*q\.txt\. Convert the file",
        ),
        ("q.csv.bz2", b"x", r"questions.path must end in \.jsonl, .*; got .*q\.csv\.bz2"),
        ("q.csv", b'prompt,topic\n"never closed,b\nc,d\n', r"q\.csv must be a CSV file; got: unexpected end of data"),
        ("q.csv", b"prompt,topic\na,b,c\n", r"q\.csv must have a column for every field; got more fields in row 1\."),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        rows(tmp_path / name)


def test_blank_fields_without_a_column_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("prompt,topic\na,b,,\n")
    assert rows(tmp_path / "q.csv") == [{"prompt": "a", "topic": "b"}]


def test_a_missing_file_is_no_name_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"questions\.path must be an existing file; got .*none\.TSV"):
        rows(tmp_path / "none.TSV")
