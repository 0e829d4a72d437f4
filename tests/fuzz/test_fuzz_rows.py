"""Rows that hold anything JSON can spell: what is wrong is a ValueError that names the row, never another exception."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz_kit import cases, dialect
from fuzz_texts import hostile
from hypothesis import given
from hypothesis import strategies as st

from axolotl_mote.benchmarks.loading import load_own_prompts
from axolotl_mote.builder.settings import QuestionSource
from axolotl_mote.builder.texts.questions import load_questions
from axolotl_mote.chain.questions import QUESTION_COLUMNS
from axolotl_mote.chain.rows import check_row
from axolotl_mote.chain.steps import DEFAULT_STEPS
from axolotl_mote.files import RowFault, parse_row
from axolotl_mote.generation.answers import AnswerFile, check_questions, read_questions
from axolotl_mote.training.dataset import Columns, check_file

STEPS = [*DEFAULT_STEPS, "check"]
VALID = {
    "id": '"1"',
    "messages": '[{"role": "user", "content": "Why?"}]',
    "analysis": '"a"',
    "guidance": '"g"',
    "response": '"r"',
    "check": '"safe"',
    "row": "1",
    "mode": '"adaptive"',
    "run": '"run"',
}
NESTED = [
    f"{left * depth}{inner}{right * depth}"
    for depth in (3, 150, 250, 400, 700, 930, 970, 990, 1200, 100_000)
    for left, inner, right in (("[", "1", "]"), ('{"role":', "1", "}"), ("[", "", ""))
]
ODD = [
    *(
        "null",
        "true",
        "0",
        "-1",
        "1.5",
        "NaN",
        "-Infinity",
        "1e999",
        "9" * 30,
        "9" * 4000,
        "9" * 5000,
        "1" * 400 + ".5",
    ),
    *(
        '""',
        '" "',
        '"\\ud800"',
        '"\\u0000"',
        '"<|response|>"',
        '"safe"',
        '"adaptive"',
        "[]",
        "{}",
        "[[]]",
        '[""]',
        "[{}]",
        "[null]",
    ),
    *(
        '[{"role": "user"}]',
        '[{"role": ["user"], "content": "x"}]',
        '[{"role": "user", "content": {}}]',
        '{"role": "user"}',
    ),
    *(
        '[{"role": "user", "content": "\\udc00"}]',
        '[{"role": "assistant", "content": "x"}]',
        '[{"from": "gpt", "value": "x"}]',
    ),
    *(
        '[{"role": {}, "content": "x"}]',
        '[{"role": null, "content": "x"}]',
        "{",
        '"',
        "tru",
        "'x'",
        "01",
        "[1,]",
        "\\",
        "﻿1",
    ),
]
SIMPLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["role", "content"]), inner, max_size=3)
    ),
    max_leaves=8,
).map(json.dumps)
VALUES = st.sampled_from(ODD) | st.sampled_from(NESTED) | SIMPLE | hostile().map(json.dumps)


@st.composite
def turns(draw: st.DrawFn) -> str:
    """A dialogue with something odd in one of its turns."""
    role, content = draw(VALUES), draw(VALUES)
    odd = draw(st.sampled_from([f'{{"role": {role}, "content": "x"}}', f'{{"role": "user", "content": {content}}}']))
    return f'[{{"role": "system", "content": "x"}}, {odd}]'


@st.composite
def lines(draw: st.DrawFn) -> tuple[str, bytes]:
    """The key that holds something odd, and the line of the file."""
    key = draw(st.sampled_from([*VALID, "messages", "messages", "extra"]))
    row = VALID | {key: draw(turns() | VALUES if key == "messages" else VALUES)}
    if draw(st.booleans()) and key != "messages":
        row.pop(draw(st.sampled_from(list(VALID))))
    line = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in row.items()) + "}"
    raw = line.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(raw)))
        raw = raw[:place] + draw(st.sampled_from([b"", b"\xff", b"\x00", b"\xed\xa0\x80", b"}", b'"'])) + raw[place:]
    return key, raw


def refused(read: Callable[[Path], Any], content: bytes, name: str) -> str:
    """What a reader says about a file; empty if it takes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            read(path)
        except ValueError as error:
            return str(error)
    return ""


def good_line(**fields: str) -> bytes:
    row = VALID | {"id": '"good"'} | fields
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in row.items()) + "}").encode()


@pytest.mark.parametrize("key", [*VALID, "role", "content"])
def test_every_odd_value_at_every_key_is_taken_or_named(key: str) -> None:
    for value in (*ODD, *NESTED):
        turn = {"role": '"user"', "content": '"x"', key: value}
        messages = f'[{{"role": {turn["role"]}, "content": {turn["content"]}}}]'
        row = VALID | ({key: value} if key in VALID else {"messages": messages})
        line = "{" + ", ".join(f'"{name}": {spelled}' for name, spelled in row.items()) + "}"
        assert_taken_or_named(key, line.encode())


@cases(60)
@given(lines())
def test_a_chain_file_is_taken_or_its_rows_named(drawn: tuple[str, bytes]) -> None:
    assert_taken_or_named(*drawn)


def assert_taken_or_named(key: str, line: bytes) -> None:
    """A file with a line that holds something odd under a key is taken, or the error names row and key."""
    said = refused(lambda path: check_file(path, STEPS), good_line() + b"\n" + line + b"\n", "c.jsonl")
    row = parse_row(line + b"\n")
    faults = [row] if isinstance(row, RowFault) else check_row(row, STEPS)
    assert bool(said) == bool(faults)
    assert all(f"row 2: {fault}" in said for fault in faults)
    assert "row 1" not in said
    if faults and key in STEPS and VALID.keys() <= (row.keys() if isinstance(row, dict) else set()):
        assert f"row 2: {key}" in said or "guidance must follow" in said
    if not faults:  # what is taken can be trained on
        dialect("byte_bpe", "chatml").codec.encode_chain(row)
    whole = refused(lambda path: check_file(path, STEPS), b"[" + good_line() + b",\n" + line + b"]", "c.json")
    assert not faults or whole
    other = Columns("messages", "from", "value", {"human": "user"})
    refused(lambda path: check_file(path, STEPS, other), line, "c.jsonl")


@cases(50)
@given(lines(), st.sampled_from(QUESTION_COLUMNS), VALUES)
def test_a_question_file_is_taken_or_its_rows_named(drawn: tuple[str, bytes], column: str, value: str) -> None:
    content = drawn[1] + b"\n" + good_line() + b"\n" + f'{{"{column}": {value}}}'.encode("utf-8", "surrogatepass")
    said = refused(check_questions, content, "q.jsonl")
    assert not said or "row 1: " in said or "row 3: " in said
    assert "row 2: " not in said
    read = refused(lambda path: list(read_questions(path)), content, "q.jsonl")
    assert bool(read) == bool(said)


@cases(50)
@given(lines(), VALUES)
def test_prompts_and_questions_of_a_build_are_taken_or_named(drawn: tuple[str, bytes], value: str) -> None:
    """A build counts the rows that it cannot use; an evaluation refuses them. Both refuse what is no row."""
    content = drawn[1] + b"\n" + f'{{"prompt": {value}}}'.encode("utf-8", "surrogatepass") + b'\n{"prompt": "Else?"}\n'
    for read in (load_own_prompts, lambda path: load_questions([QuestionSource(path=str(path))])):
        said = refused(read, content, "q.jsonl")
        assert not said or re.search(r"row [12]: ", said)


@pytest.mark.parametrize("key", ["row", "mode", "run", "messages", "id"])
def test_every_odd_value_of_an_answer_is_taken_or_refused(key: str) -> None:
    for value in (*ODD, *NESTED):
        assert_continued_or_refused(good_line(**{"row": "2", key: value}))


@cases(50)
@given(lines())
def test_an_answer_file_is_continued_or_refused(drawn: tuple[str, bytes]) -> None:
    assert_continued_or_refused(drawn[1])


def assert_continued_or_refused(line: bytes) -> None:
    """A file of answers with an odd second line is continued, or the error says what it must be."""

    def resume(path: Path) -> None:
        AnswerFile(path, ["adaptive"], "run").close()

    said = refused(resume, good_line() + b"\n" + line + b"\n", "a.jsonl")
    assert not said or "output must" in said
