"""Numbers that describe a chain data set: the paper's Table 2, lengths, chain forms, verdicts, rejections.

Rows in, plain data out; it knows nothing about how the numbers are shown.
"""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axolotl_mote.builder.selfbleu import self_bleu, tokenize

STEPS = ("analysis", "guidance", "response")
WHOLE = "chain"
SAMPLE = 10_000
BINS = 24


@dataclass(frozen=True)
class StepNumbers:
    """One row of Table 2 and the lengths behind it.

    Attributes:
        count, share: Chains that hold this step, and their share of all chains (0 to 1).
        self_bleu: 0 to 100, lower is more diverse; None for fewer than two texts.
        words_mean, words_median, words_p95, words_max: Lengths in words and punctuation marks.
        histogram: (first length, last length, number of texts) of each bin.
    """

    count: int
    share: float
    self_bleu: float | None
    words_mean: float
    words_median: float
    words_p95: int
    words_max: int
    histogram: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Summary:
    """Statistics of a chain data set. ``steps`` holds analysis, guidance, response and the whole chain."""

    chains: int
    sampled: int | None
    steps: dict[str, StepNumbers]
    forms: dict[str, int]
    checks: dict[str, int]
    turns: dict[str, int]
    rejected: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def summarise(
    chains: Sequence[dict[str, Any]], rejected: Iterable[dict[str, Any]] = (), *, sample: int = SAMPLE, seed: int = 0
) -> Summary:
    """Describe chain rows.

    Args:
        chains: Chain rows.
        rejected: Rows with a ``reason``.
        sample: Self-BLEU of at most this many chains, drawn with ``seed``; it depends on the size of the set, so
            compare sets of one size. 0: all.
        seed: Of the draw.

    Raises:
        ValueError: If there are no chains.
    """
    if not chains:
        raise ValueError("the chain file must hold at least one chain; got none. Look into rejected.jsonl for reasons.")
    chosen = set(range(len(chains)))
    sampled = None
    if 0 < sample < len(chains):
        chosen, sampled = set(random.Random(seed).sample(range(len(chains)), sample)), sample
    steps = {}
    for step in (*STEPS, WHOLE):
        texts = {i: tokenize(text) for i, row in enumerate(chains) if (text := _text(row, step))}
        bleu = self_bleu([words for i, words in texts.items() if i in chosen])
        steps[step] = _numbers([len(words) for words in texts.values()], len(chains), bleu)
    return Summary(
        chains=len(chains),
        sampled=sampled,
        steps=steps,
        forms=_counter("+".join(step for step in STEPS if row.get(step)) for row in chains),
        checks=_counter(str(row.get("check") or "none") for row in chains),
        turns=_counter(str(sum(m.get("role") == "user" for m in row.get("messages") or [])) for row in chains),
        rejected=_counter(str(row.get("reason")) for row in rejected),
    )


def read_chains(path: Path) -> list[dict[str, Any]]:
    """Rows of a chain file.

    Raises:
        ValueError: If lines are not JSON objects with a ``response``; all at once, with their numbers.
    """
    rows, faults = read_jsonl(path), []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("response"), str):
            faults.append(f"  row {number}: response is {type(row.get('response')).__name__}, not text")
    if faults:
        raise ValueError(f"{path} must hold chain rows; got {len(faults)} others:\n" + "\n".join(faults[:20]))
    return rows


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file.

    Raises:
        ValueError: If the file cannot be read or a line is no JSON object.
    """
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number} is no object")
                    rows.append(row)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must hold one JSON object a line; got: {error}. Correct the file.") from error
    return rows


def _text(row: dict[str, Any], step: str) -> str:
    return "\n".join(row[s] for s in STEPS if row.get(s)) if step == WHOLE else row.get(step) or ""


def _numbers(lengths: list[int], total: int, bleu: float | None) -> StepNumbers:
    if not lengths:
        return StepNumbers(0, 0.0, None, 0.0, 0.0, 0, 0, [])
    ordered = sorted(lengths)
    return StepNumbers(
        count=len(lengths),
        share=len(lengths) / total,
        self_bleu=bleu,
        words_mean=statistics.fmean(lengths),
        words_median=statistics.median(ordered),
        words_p95=ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        words_max=ordered[-1],
        histogram=_histogram(ordered),
    )


def _histogram(ordered: list[int]) -> list[tuple[int, int, int]]:
    """At most BINS bins of one width, from 0 to the largest length."""
    width = ordered[-1] // BINS + 1
    counts = Counter(length // width for length in ordered)
    return [(b * width, (b + 1) * width - 1, counts[b]) for b in range(ordered[-1] // width + 1)]


def _counter(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))
