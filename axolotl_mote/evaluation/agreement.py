"""A judge of refusals against human labels: agreement, kappa, confusion, F1, with intervals clustered by prompt.

A labelled answer has three texts: ``prompt``, ``completion``, ``human_label``. Answers that the judge could not score
are counted by reason and are in no rate; ``worst_case`` counts them as disagreement.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from axolotl_mote.evaluation.statistics import Interval, cohen_kappa, rate_interval
from axolotl_mote.files import RowFault, raise_faults, read_jsonl

Label = Literal["full_compliance", "partial_refusal", "full_refusal"]

LABELS: tuple[Label, ...] = ("full_compliance", "partial_refusal", "full_refusal")

SPELLINGS: dict[str, Label] = {
    **{label: label for label in LABELS},
    "1_full_compliance": "full_compliance",
    "2_full_refusal": "full_refusal",
    "3_partial_refusal": "partial_refusal",
}
"""Spellings of ``human_label``; the numbered ones are XSTest's."""


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer and what a human said of it.

    Args:
        prompt: The question.
        completion: The answer alone.
        label: What a human said of it.
        cluster: Answers with the same one are not independent: ``prompt_id`` if the row has it, else the prompt.
        model: Who answered; "" if the row does not say.
    """

    prompt: str
    completion: str
    label: Label
    cluster: str
    model: str = ""


def read_labelled(path: Path) -> list[LabelledAnswer]:
    """Read labelled answers from JSON lines; columns other than those of ``LabelledAnswer`` are ignored.

    Raises:
        ValueError: If rows are not labelled answers, all of them at once; or if there is none.
    """
    return labelled_answers(read_jsonl(path), str(path))


def labelled_answers(rows: Iterable[tuple[int, Mapping[str, Any] | RowFault]], where: str) -> list[LabelledAnswer]:
    """Check numbered rows: ``prompt``, ``completion``, ``human_label``, and ``prompt_id`` and ``model`` where given.

    Raises:
        ValueError: If rows have faults, all of them at once; or if there is no row.
    """
    answers: list[LabelledAnswer] = []
    faults: list[str] = []
    for number, row in rows:
        found = [str(row)] if isinstance(row, RowFault) else _faults(row)
        faults += [f"{where}, row {number}: {fault}" for fault in found]
        if not found and not isinstance(row, RowFault):
            cluster = row.get("prompt_id")
            answers.append(
                LabelledAnswer(
                    row["prompt"],
                    row["completion"],
                    SPELLINGS[row["human_label"].strip()],
                    row["prompt"] if cluster is None else str(cluster),
                    str(row.get("model") or ""),
                )
            )
    raise_faults(faults, f"{where} must hold labelled answers; got {{faults}}.")
    if not answers:
        raise ValueError(f"{where} must hold labelled answers; got no row. Write one JSON object per line.")
    return answers


def _faults(row: Mapping[str, Any]) -> list[str]:
    faults = []
    for key in ("prompt", "completion"):
        if not isinstance(row.get(key), str):
            got = f"{type(row[key]).__name__}" if key in row else "no such column"
            faults.append(f"{key} must be a text; got {got}. Write a string.")
    label = row.get("human_label")
    if not isinstance(label, str) or label.strip() not in SPELLINGS:
        got = repr(label)[:60] if "human_label" in row else "no such column"
        faults.append(f"human_label must be one of {', '.join(SPELLINGS)}; got {got}. Correct the label.")
    return faults


@dataclass(frozen=True)
class Agreement:
    """A judge against human labels. Rates are over scored answers; NaN where there is nothing to count.

    Args:
        rows: All answers.
        n: Those that the judge scored.
        unscored: Number of the others by status.
        confusion: (3, 3) counts; row = human, column = judge, in the order of ``LABELS``.
        binary, three_class: Agreement on full compliance against the rest, and on the class.
        kappa_binary, kappa: Cohen's kappa of both.
        f1: Of each class.
        intervals: 95 % of all these, by the name they have in ``as_dict``.
    """

    rows: int
    n: int
    unscored: dict[str, int]
    confusion: NDArray[np.int64]
    binary: float
    three_class: float
    kappa_binary: float
    kappa: float
    f1: dict[str, float]
    intervals: dict[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is not defined is None."""
        share = self.n / self.rows if self.rows else 0.0
        intervals = {name: [_number(found.low), _number(found.high)] for name, found in self.intervals.items()}
        matrix = {
            human: dict(zip(LABELS, counts, strict=True))
            for human, counts in zip(LABELS, self.confusion.tolist(), strict=True)
        }
        return {
            "n": self.n,
            "rows": self.rows,
            "unscored": self.unscored,
            "agreement_binary": _number(self.binary),
            "agreement_three_class": _number(self.three_class),
            "kappa_binary": _number(self.kappa_binary),
            "kappa": _number(self.kappa),
            "f1": {label: _number(value) for label, value in self.f1.items()},
            "confusion_matrix": matrix,
            "intervals": intervals,
            "worst_case": {
                "agreement_binary": _number(self.binary * share) if self.n else 0.0,
                "agreement_three_class": _number(self.three_class * share) if self.n else 0.0,
            },
        }


def measure_agreement(
    answers: Sequence[LabelledAnswer],
    verdicts: Sequence[Label | None],
    statuses: Sequence[str] | None = None,
    *,
    samples: int = 2000,
) -> Agreement:
    """Compare verdicts with the labels of the same answers.

    Args:
        answers: (N,) with human labels.
        verdicts: (N,) what the judge said; None if it could not score the answer.
        statuses: (N,) why it could not; "unscored" by default.
        samples: Draws of the intervals of kappa and F1.

    Raises:
        ValueError: If the numbers differ.

    Example:
        >>> one = LabelledAnswer("How?", "Like this.", "full_compliance", "How?")
        >>> measure_agreement([one], ["full_compliance"]).binary
        1.0
    """
    statuses = ["unscored"] * len(answers) if statuses is None else statuses
    if not len(answers) == len(verdicts) == len(statuses):
        got = f"{len(answers)}, {len(verdicts)} and {len(statuses)}"
        raise ValueError(f"answers, verdicts and statuses must be as many; got {got}. Give one per answer.")
    scored = [(answer, verdict) for answer, verdict in zip(answers, verdicts, strict=True) if verdict is not None]
    unscored = Counter(status for status, verdict in zip(statuses, verdicts, strict=True) if verdict is None)
    pairs = np.array([3 * LABELS.index(answer.label) + LABELS.index(verdict) for answer, verdict in scored], dtype=int)
    clusters = [answer.cluster for answer, _ in scored]
    confusion = _confusion(pairs)
    hits = {
        "agreement_binary": (pairs // 3 == 0) == (pairs % 3 == 0),
        "agreement_three_class": pairs // 3 == pairs % 3,
    }
    intervals = {name: rate_interval(hit.astype(float), clusters) for name, hit in hits.items()}
    draws = list(_draws(pairs, clusters, samples))
    f1 = np.array([_f1(draw) for draw in draws]).reshape(-1, len(LABELS))
    rest = {
        "kappa_binary": np.array([cohen_kappa(_binary(draw)) for draw in draws]),
        "kappa": np.array([cohen_kappa(draw) for draw in draws]),
        **{f"f1_{label}": f1[:, number] for number, label in enumerate(LABELS)},
    }
    intervals |= {name: _interval(values) for name, values in rest.items()}
    means = {name: float(hit.mean()) if len(hit) else math.nan for name, hit in hits.items()}
    return Agreement(
        rows=len(answers),
        n=len(scored),
        unscored=dict(sorted(unscored.items())),
        confusion=confusion,
        binary=means["agreement_binary"],
        three_class=means["agreement_three_class"],
        kappa_binary=cohen_kappa(_binary(confusion)),
        kappa=cohen_kappa(confusion),
        f1=dict(zip(LABELS, _f1(confusion).tolist(), strict=True)),
        intervals=intervals,
    )


def _draws(pairs: NDArray[Any], clusters: Sequence[str], samples: int, seed: int = 0) -> Iterator[NDArray[Any]]:
    """Confusion matrices of the same clusters, drawn as a whole with replacement."""
    numbers = (
        np.unique(np.array(clusters, dtype=object), return_inverse=True)[1] if clusters else np.zeros(0, dtype=int)
    )
    k, size = int(numbers.max(initial=-1)) + 1, len(LABELS) ** 2
    counts = np.bincount(numbers * size + pairs, minlength=k * size).reshape(k, size)
    rng = np.random.default_rng(seed)
    for _ in range(samples if k else 0):
        times = np.bincount(rng.integers(k, size=k), minlength=k)
        yield (times @ counts).reshape(len(LABELS), -1)


def _interval(values: NDArray[np.float64]) -> Interval:
    """The middle 95 % of the finite values."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return Interval(math.nan, math.nan)
    low, high = np.quantile(finite, [0.025, 0.975])
    return Interval(float(low), float(high))


def _confusion(pairs: NDArray[Any]) -> NDArray[np.int64]:
    """(3, 3) counts of pairs, each 3 * human + judge."""
    size = len(LABELS)
    return np.bincount(np.asarray(pairs).astype(int), minlength=size * size).reshape(size, size)


def _binary(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """(2, 2): full compliance against the rest."""
    rows = np.stack([confusion[0], confusion[1:].sum(axis=0)])
    return np.stack([rows[:, 0], rows[:, 1:].sum(axis=1)], axis=1)


def _f1(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """(3,) F1 of each class; NaN for one that neither used."""
    used = confusion.sum(axis=0) + confusion.sum(axis=1)
    scores: NDArray[np.float64] = np.where(used > 0, 2 * np.diag(confusion) / np.maximum(used, 1), np.nan)
    return scores


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
