"""The look-up task: right by an evaluator that shares no code with the generator, no leak, single tokens, scoring."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lookup
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_mote.chain.rows import check_rows

STEPS = ["analysis", "guidance", "response"]


def solve(question: str) -> tuple[str, list[str], list[str]]:
    """Answer, lines used from the name to its digit, and sums from the digit to the name: by substitution."""
    *lines, asked = question.split("\n")
    table = {}
    for line in lines:
        name, expression = re.fullmatch(r"([a-z])=(\d|[a-z]|[a-z][+-]\d)", line).groups()  # type: ignore[union-attr]
        assert name not in table
        table[name] = expression
    name, path, sums = asked.removesuffix("?"), [], []
    while True:
        expression = table[name]
        path.append(f"{name}={expression}")
        if expression.isdigit():
            break
        name = expression[0]
    value = int(expression)
    for line in reversed(path[:-1]):
        if added := line[3:]:
            sums.append(f"{value}{added}={value + int(added)}")
            value += int(added)
    assert all(0 <= int(line[-1]) <= 9 for line in sums)
    return str(value), path, sums


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(list(lookup.LEVELS)))
def test_rows_are_right(seed: int, level: str) -> None:
    row = lookup.make_row(level, random.Random(seed))
    question = row["messages"][0]["content"]
    answer, path, sums = solve(question)
    kind = lookup.LEVELS[level]
    assert len(question.split("\n")) == lookup.LINES + 1
    assert row["response"] == row["target"] == answer
    assert len(path) - 1 in kind.links
    assert len(sums) == (len(path) - 1 if kind.sums else 0)
    assert row["texts"]["analysis"] == "\n".join(path)
    assert row["texts"]["guidance"] == ("\n".join(sums) or f"{answer}={answer}")
    assert {step for step in STEPS if row[step]} == set(kind.steps)


def test_data_set() -> None:
    rows = lookup.train_rows(880, 0)
    check_rows(enumerate(rows, start=1), STEPS, "look-up")
    assert Counter(row["level"] for row in rows) == dict.fromkeys(lookup.LEVELS, 220)
    longer = Counter(
        row["level"] for row in rows if {s for s in STEPS if row[s]} != set(lookup.LEVELS[row["level"]].steps)
    )
    assert longer == {"easy": 18, "medium": 18}  # 8 % of 220
    easy = [row for row in rows if row["level"] == "easy" and row["analysis"]]
    assert Counter(bool(row["guidance"]) for row in easy) == {True: 9, False: 9}
    assert [row["level"] for row in rows[:4]] != sorted(row["level"] for row in rows[:4]) or rows[0] != rows[1]


def test_test_rows_are_never_trained_on() -> None:
    tests, tuning = lookup.test_rows(), lookup.tuning_rows()
    keys = [lookup.key(row) for row in [*tests, *tuning]]
    assert len(keys) == len(set(keys)) == 2 * len(lookup.LEVELS) * lookup.PER_LEVEL
    for seed in (0, 1, 1000, lookup.TEST_SEED):  # the last would draw exactly the test rows
        assert not set(keys) & {lookup.key(row) for row in lookup.train_rows(400, seed)}


def test_key_sees_through_the_order_of_lines() -> None:
    def row(text: str) -> dict[str, Any]:
        return {"messages": [{"content": text}]}

    assert lookup.key(row("a=1\nb=a\nb?")) == lookup.key(row("b=a\na=1\nb?")) != lookup.key(row("b=a\na=1\na?"))


def test_seed_decides() -> None:
    assert lookup.train_rows(40, 3) == lookup.train_rows(40, 3) != lookup.train_rows(40, 4)


@pytest.mark.parametrize("count", [0, -4, 6])
def test_levels_are_equally_frequent_or_refused(count: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        lookup.rows_of(count, 0)


def test_every_character_is_one_token(smollm2_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    for row in lookup.test_rows()[::20]:
        for text in (row["messages"][0]["content"], *(row[step] for step in STEPS if row[step])):
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == len(text)


@dataclass
class Answer:
    answer: str | None
    spent: int = 7
    finished: bool = True


@pytest.mark.parametrize("answer", ["12", "2.", "2 2", "", None, "２", "two", "2=2", "\u200b2"])
def test_only_the_digit_matches(answer: str | None) -> None:
    assert not lookup.is_match(answer, "2")


@pytest.mark.parametrize("answer", ["2", " 2", "2\n"])
def test_white_space_is_ignored(answer: str) -> None:
    assert lookup.is_match(answer, "2")


def test_score_counts_by_level() -> None:
    rows = [{"level": "easy", "target": "2"}] * 3 + [{"level": "hard", "target": "9"}]
    cells = lookup.score(rows, [Answer("2"), Answer("3", 9), Answer("", 5, False), Answer("9")])
    assert cells == {"easy": lookup.Cell(1, 3, 7.0, 2), "hard": lookup.Cell(1, 1, 7.0, 1)}
    assert cells["easy"].accuracy == pytest.approx(1 / 3)
    assert cells["easy"].interval.low < 1 / 3 < cells["easy"].interval.high


def test_a_missing_answer_is_no_smaller_n() -> None:
    with pytest.raises(ValueError, match="shorter"):
        lookup.score([{"level": "easy", "target": "2"}] * 2, [Answer("2")])
