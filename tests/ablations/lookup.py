"""Variable look-up: a data set of chains that checks itself, and its scoring by exact match.

A question is five shuffled lines and a name, the answer one digit:

    v=8            analysis  g=y+3        guidance  8-2=6        response  9
    h=3                      y=v-2                  6+3=9
    g=y+3                    v=8
    e=5
    y=v-2
    g?

`easy` looks a digit up (response alone), `one_sum` adds or subtracts once (analysis, guidance, response), `medium`
follows one or two aliases (analysis, response), `hard` computes two or three times (all steps). Some chains of `easy`
and `medium` are longer than needed, so that a model asked for more steps than it would choose has seen such chains.

Nothing here knows a model. Letters, digits and signs are single tokens for SmolLM2; a test checks it.
"""

from __future__ import annotations

import functools
import random
import string
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from axolotl_mote.evaluation.statistics import Interval, wilson_interval

LINES = 5
LONGER = 0.08
"""Share of the easy and medium rows whose chain is longer than needed."""
TEST_SEED = 90_001
TUNE_SEED = 90_002
PER_LEVEL = 200


@dataclass(frozen=True)
class Level:
    """How many links lead from the name to its digit, and of which kind."""

    links: tuple[int, ...]
    sums: bool
    steps: tuple[str, ...]


LEVELS = {
    "easy": Level((0,), False, ("response",)),
    "one_sum": Level((1,), True, ("analysis", "guidance", "response")),
    "medium": Level((1, 2), False, ("analysis", "response")),
    "hard": Level((2, 3), True, ("analysis", "guidance", "response")),
}


@dataclass(frozen=True)
class Line:
    """One line, such as ``g=y+3``: a name, the name it refers to (none for a digit), what is added, and its value."""

    name: str
    of: str | None
    added: int
    value: int

    def __str__(self) -> str:
        if self.of is None:
            return f"{self.name}={self.value}"
        return f"{self.name}={self.of}{self.added:+d}" if self.added else f"{self.name}={self.of}"


def make_row(level: str, rng: random.Random) -> dict[str, Any]:
    """One chain row of a level, with its ``level`` and ``target``, and without chains longer than needed."""
    names = rng.sample(string.ascii_lowercase, LINES)
    kind = LEVELS[level]
    path = [_digit(names.pop(), rng)]
    for _ in range(rng.choice(kind.links)):
        path.append(_link(names.pop(), path[-1], kind.sums, rng))
    lines = list(path)
    while names:
        drawn = rng.random()
        other = _digit(names[-1], rng) if drawn < 0.4 else _link(names[-1], rng.choice(lines), drawn < 0.8, rng)
        names.pop()
        lines.append(other)
    rng.shuffle(lines)
    asked = path[-1]
    question = "\n".join([*map(str, lines), f"{asked.name}?"])
    texts = {
        "analysis": "\n".join(map(str, reversed(path))),
        "guidance": "\n".join(_sums(path)) or f"{asked.value}={asked.value}",
        "response": str(asked.value),
    }
    return {
        "messages": [{"role": "user", "content": question}],
        **{step: text if step in kind.steps else None for step, text in texts.items()},
        "level": level,
        "target": str(asked.value),
        "texts": texts,
    }


def _digit(name: str, rng: random.Random) -> Line:
    return Line(name, None, 0, rng.randrange(10))


def _link(name: str, to: Line, with_sum: bool, rng: random.Random) -> Line:
    """An alias of a line, or a sum whose value is one digit again."""
    added = rng.choice([n for n in range(-9, 10) if n and 0 <= to.value + n <= 9]) if with_sum else 0
    return Line(name, to.name, added, to.value + added)


def _sums(path: Sequence[Line]) -> list[str]:
    return [f"{before.value}{line.added:+d}={line.value}" for before, line in pairwise(path) if line.added]


def key(row: dict[str, Any]) -> str:
    """What makes two rows the same question: the lines in any order, and the name asked for."""
    *lines, asked = row["messages"][0]["content"].split("\n")
    return "\n".join([*sorted(lines), asked])


def rows_of(count: int, seed: int, taken: Collection[str] = (), longer: float = LONGER) -> list[dict[str, Any]]:
    """Chain rows, all levels equally often, in random order; none twice and none of the ``taken`` keys.

    Args:
        count: Number of rows; a multiple of the number of levels.
        seed: Same seed, same rows.
        taken: Keys of rows that must not occur.
        longer: Share of the easy and medium rows whose chain is longer than needed.

    Raises:
        ValueError: If the count does not give every level as many rows.
    """
    if count < 1 or count % len(LEVELS):
        raise ValueError(
            f"count must be a positive multiple of {len(LEVELS)}, the number of levels; got {count}. Round it."
        )
    rng, seen, rows = random.Random(seed), set(taken), []
    for level in LEVELS:
        of_level: list[dict[str, Any]] = []
        while len(of_level) < count // len(LEVELS):
            row = make_row(level, rng)
            if key(row) not in seen:
                seen.add(key(row))
                of_level.append(row)
        if level in ("easy", "medium"):
            _lengthen(of_level, level, longer)
        rows += of_level
    rng.shuffle(rows)
    return [{name: value for name, value in row.items() if name != "texts"} for row in rows]


def _lengthen(rows: list[dict[str, Any]], level: str, share: float) -> None:
    """Give the first rows of a level every step, of the easy ones every second an analysis alone."""
    for number, row in enumerate(rows[: round(share * len(rows))]):
        row["analysis"] = row["texts"]["analysis"]
        if level != "easy" or number % 2:
            row["guidance"] = row["texts"]["guidance"]


@functools.cache
def _pool(seed: int) -> tuple[dict[str, Any], ...]:
    taken = {key(row) for row in _pool(TEST_SEED)} if seed != TEST_SEED else ()
    return tuple(rows_of(PER_LEVEL * len(LEVELS), seed, taken))


def test_rows() -> list[dict[str, Any]]:
    """The rows that are answered: the same for every row of the table and every seed."""
    return list(_pool(TEST_SEED))


test_rows.__test__ = False  # type: ignore[attr-defined]  # none of pytest's


def tuning_rows() -> list[dict[str, Any]]:
    """The rows on which learning rates are compared; none is among ``test_rows``."""
    return list(_pool(TUNE_SEED))


def train_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows to train on; none is among ``test_rows`` or ``tuning_rows``."""
    return rows_of(count, seed, {key(row) for row in [*test_rows(), *tuning_rows()]})


@dataclass(frozen=True)
class Cell:
    """Exact matches of one level in one mode."""

    right: int
    n: int
    tokens: float
    """Mean tokens of a chain, markers included."""
    finished: int

    @property
    def accuracy(self) -> float:
        """Share of exact matches."""
        return self.right / self.n

    @property
    def interval(self) -> Interval:
        """Its 95 % interval, by Wilson."""
        return wilson_interval(self.right, self.n)


def is_match(answer: str | None, target: str) -> bool:
    """Whether an answer is the digit and nothing else, white space aside."""
    return (answer or "").strip() == target


def score(rows: Sequence[dict[str, Any]], chains: Iterable[Any]) -> dict[str, Cell]:
    """Cells by level.

    Args:
        rows: What was asked.
        chains: The answers, in the same order: objects with ``answer``, ``spent`` and ``finished``.

    Raises:
        ValueError: If there is not one chain for each row.
    """
    sums: dict[str, list[float]] = {level: [0, 0, 0, 0] for level in LEVELS}
    for row, chain in zip(rows, chains, strict=True):
        found = (is_match(chain.answer, row["target"]), 1, chain.spent, bool(chain.finished))
        sums[row["level"]] = [a + b for a, b in zip(sums[row["level"]], found, strict=True)]
    return {
        level: Cell(int(right), int(n), tokens / n, int(finished))
        for level, (right, n, tokens, finished) in sums.items()
        if n
    }
