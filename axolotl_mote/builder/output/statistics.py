"""Numbers that describe a chain data set: the paper's Table 2, lengths, chain forms, verdicts, rejections.

Rows in, plain data out; ``tables`` and ``report`` show it.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axolotl_mote.builder.output.selfbleu import self_bleu, tokenize
from axolotl_mote.chain.steps import DEFAULT_STEPS, chain_form
from axolotl_mote.files import read_jsonl, sound_rows

WHOLE = "chain"
SAMPLE = 10_000
BINS = 24


@dataclass(frozen=True)
class StepNumbers:
    """One row of Table 2 and the lengths behind it.

    Attributes:
        count, share: Chains with this step, and their share of all chains (0 to 1).
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
    """Statistics of a chain data set.

    Attributes:
        chains: Number of chains.
        refused: Rows whose question generation refused; all other numbers leave them out.
        sampled: Chains drawn for Self-BLEU; None if it uses all.
        steps: Numbers of every step and of the whole chain.
        forms, checks, turns, rejected: Counts of chain forms, verdicts, user turns and reasons of rejection.
    """

    chains: int
    refused: int
    sampled: int | None
    steps: dict[str, StepNumbers]
    forms: dict[str, int]
    checks: dict[str, int]
    turns: dict[str, int]
    rejected: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def summarize(
    rows: Iterable[dict[str, Any]],
    rejected: Iterable[dict[str, Any]] = (),
    *,
    steps: Sequence[str] = DEFAULT_STEPS,
    sample: int = SAMPLE,
    seed: int = 0,
) -> Summary:
    """Describe chain rows.

    Args:
        rows: Chain rows; read several times, so no iterator. Memory does not hold them.
        rejected: Rows with a ``reason``; read once.
        steps: The steps of the chains, in order; the last one is the answer.
        sample: Self-BLEU of at most this many chains, drawn with ``seed``; 0: all. Self-BLEU grows with the number of
            chains, so compare sets of one size.
        seed: Seed of the draw.

    Raises:
        ValueError: If there are no chains, or a step is named like the whole.
    """
    if WHOLE in steps:
        raise ValueError(
            f"steps must not hold {WHOLE!r}, the name of the whole chain; got {list(steps)}. Rename the step."
        )
    reasons = Counter(str(row.get("reason")) for row in rejected)
    forms, checks, turns = Counter[str](), Counter[str](), Counter[str]()
    refused = 0
    for row in rows:
        if _is_refused(row, steps):
            refused += 1
            continue
        forms[chain_form(step for step in steps if row.get(step))] += 1
        checks[str(row.get("check") or "none")] += 1
        turns[str(_user_turns(row.get("messages")))] += 1
    chains = forms.total()
    if not chains:
        raise ValueError(
            f"the chain file must hold at least one chain; got {refused} refused rows and no chain. See "
            "rejected.jsonl or the column error for the reasons."
        )
    sampled = sample if 0 < sample < chains else None
    chosen = None if sampled is None else set(random.Random(seed).sample(range(chains), sampled))
    return Summary(
        chains=chains,
        refused=refused,
        sampled=sampled,
        steps={name: _step_numbers(rows, steps, name, chains, chosen) for name in (*steps, WHOLE)},
        forms=_ordered(forms),
        checks=_ordered(checks),
        turns=_ordered(turns),
        rejected=_ordered(reasons),
    )


def _step_numbers(
    rows: Iterable[dict[str, Any]], steps: Sequence[str], name: str, chains: int, chosen: set[int] | None
) -> StepNumbers:
    """The numbers of one step, or of the whole chain; ``chosen`` chains count for Self-BLEU, or all."""
    parts = steps if name == WHOLE else (name,)
    lengths: list[int] = []
    texts: list[list[str]] = []
    for number, row in enumerate(row for row in rows if not _is_refused(row, steps)):
        text = _text(row, parts)
        if not text:
            continue
        words = tokenize(text)
        lengths.append(len(words))
        if chosen is None or number in chosen:
            texts.append(list(map(sys.intern, words)))  # most words occur often: one copy of each
    return _numbers(lengths, chains, self_bleu(texts))


def read_chains(path: Path, steps: Sequence[str] = DEFAULT_STEPS) -> Iterable[dict[str, Any]]:
    """Rows of a chain file, of ``axolotl mote build`` or ``generate``.

    Returns:
        The rows; each iteration reads the file again, so memory does not hold them. A pipe can be read only once: its
        rows come as a list.

    Raises:
        ValueError: When they are iterated over, after the last row: if a line is not a JSON object, a step is not a
            string, or an answer is missing although generation neither refused the question nor left it unfinished;
            all such rows at once, with their numbers.
    """
    rows = _ChainFile(path, steps)
    return rows if path.is_file() else list(rows)


@dataclass(frozen=True)
class _ChainFile:
    """The rows of ``read_chains``."""

    path: Path
    steps: Sequence[str]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        message = (
            f"{self.path} must hold chains of {', '.join(self.steps)}; got {{faults}}. Correct them, or name the steps "
            "of these chains with --steps."
        )
        return (row for _, row in sound_rows(read_jsonl(self.path), message, self._faults))

    def _faults(self, row: dict[str, Any]) -> list[str]:
        unanswered = _is_refused(row, self.steps) or row.get("finished") is False
        answer = self.steps[-1]
        needed = [step for step in self.steps if row.get(step) is not None or (step == answer and not unanswered)]
        wrong = {step: type(row.get(step)).__name__ for step in needed if not isinstance(row.get(step), str)}
        return [f"{step} must be a string; got {kind}." for step, kind in wrong.items()]


def _user_turns(messages: Any) -> int:
    """Number of user turns; foreign files can hold anything here."""
    turns = messages if isinstance(messages, list) else []
    return sum(isinstance(turn, dict) and turn.get("role") == "user" for turn in turns)


def _is_refused(row: dict[str, Any], steps: Sequence[str]) -> bool:
    """Whether generation refused the question. With an answer, ``error`` is a column of the question's own source."""
    return row.get("error") is not None and not row.get(steps[-1])


def _text(row: dict[str, Any], steps: Sequence[str]) -> str:
    return "\n".join(row[step] for step in steps if row.get(step))


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


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
