"""Two systems, or two modes of one, on the same prompts: by how much they differ, and whether that is more than noise.

Only answers that were scored for both are compared; they are told apart by the id of the prompt. What is left out is
counted, and a comparison that cannot be made is named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from axolotl_mote.evaluation.figures.cells import variant_name
from axolotl_mote.evaluation.figures.measures import Better, Measure, Row
from axolotl_mote.evaluation.statistics import (
    paired_bootstrap,
    paired_rate_interval,
    prompts_needed,
    sign_flip_test,
)

_SIGNIFICANT = 0.05
_SMALL = 0.05
"""The difference of ``needed_small``, as a share of the scale."""


@dataclass(frozen=True)
class Comparison:
    """Two systems, or two modes of one, on the same prompts.

    Args:
        task, measure, title: What is compared.
        first, second: System and mode.
        pairs, prompts: Answers scored for both, and different prompts among them.
        left_out: Answers that are not scored for both, though asked of one at least.
        difference, low, high: Mean of the second minus mean of the first, with its 95 % interval.
        first_only, second_only: For rates: prompts where one alone has a hit.
        p: Of the sign-flip test by prompts; for rates with one answer per prompt it is McNemar's exact test.
        verdict: better or worse (the second against the first), higher or lower, or within noise.
        needed: Prompts that would show a difference of this size; None if there is none.
        needed_small: Prompts that would show 5 points, or 5 % of the scale; None if the systems never differ.
        words: All of it in one sentence.
    """

    task: str
    measure: str
    title: str
    first: tuple[str, str]
    second: tuple[str, str]
    pairs: int
    prompts: int
    left_out: int
    difference: float
    low: float
    high: float
    first_only: int | None
    second_only: int | None
    p: float
    verdict: str
    needed: int | None
    needed_small: int | None
    words: str

    @property
    def is_rate(self) -> bool:
        """Whether verdicts were compared, not scores."""
        return self.first_only is not None


def compare(
    measure: Measure,
    task: str,
    first: tuple[tuple[str, str], Sequence[Row]],
    second: tuple[tuple[str, str], Sequence[Row]],
    seed: int = 0,
) -> Comparison | None:
    """Compare two systems on the answers that were scored for both; None if there are fewer than two prompts.

    Args:
        measure: What is compared.
        task: Name of the task.
        first, second: System and mode, and their rows.
        seed: Seed of the bootstrap.
    """
    one, two = _scored(measure, first[1]), _scored(measure, second[1])
    keys = [key for key in one if key in two]
    clusters = [one[key][0] for key in keys]
    if len(set(clusters)) < 2:
        return None
    differences = np.array([two[key][1] - one[key][1] for key in keys])
    p = sign_flip_test(differences, clusters, seed=seed)
    more = less = None
    if measure.is_rate and np.isin(differences, (-1.0, 0.0, 1.0)).all():
        more, less = int((differences > 0).sum()), int((differences < 0).sum())
        interval = paired_rate_interval(differences, clusters)
        clear = p < _SIGNIFICANT
    else:
        interval = paired_bootstrap(differences, clusters, seed=seed)
        clear = p < _SIGNIFICANT and 0 not in interval
    difference = float(differences.mean())
    size = _Needed(differences, clusters, more is not None)
    asked = {_key(row) for row in (*first[1], *second[1]) if measure.covers(row)}
    found = Comparison(
        task=task,
        measure=measure.key,
        title=measure.title,
        first=first[0],
        second=second[0],
        pairs=len(keys),
        prompts=len(set(clusters)),
        left_out=len(asked) - len(keys),
        difference=difference,
        low=interval.low,
        high=interval.high,
        first_only=less,
        second_only=more,
        p=p,
        verdict=_verdict(difference, measure.better) if clear and difference else "within noise",
        needed=size.prompts(difference),
        needed_small=size.prompts(_SMALL * _span(measure)),
        words="",
    )
    return replace(found, words=_words(found))


def not_compared(
    measure: Measure,
    task: str,
    first: tuple[tuple[str, str], Sequence[Row]],
    second: tuple[tuple[str, str], Sequence[Row]],
) -> str | None:
    """Why ``compare`` gives nothing, in words; None if neither system has a score, which the figures say.

    Args:
        measure, task, first, second: As for ``compare``.
    """
    one, two = _scored(measure, first[1]), _scored(measure, second[1])
    if not one and not two:
        return None
    shared = len({prompt for key, (prompt, _) in one.items() if key in two})
    return (
        f"{variant_name(second[0])} against {variant_name(first[0])}, {task}, {measure.title}: not compared. A "
        f"comparison takes 2 prompts that are scored for both; there are {shared}, of {len(two):,} and {len(one):,} "
        "scored answers. Prompts are told apart by their ids."
    )


def _key(row: Row) -> tuple[str, int]:
    return row["id"], row["epoch"]


def _scored(measure: Measure, rows: Iterable[Row]) -> dict[tuple[str, int], tuple[str, float]]:
    """(id, epoch) -> (prompt id, value)."""
    values = ((row, measure.value(row)) for row in rows if measure.covers(row))
    return {_key(row): (row["prompt_id"], value) for row, value in values if value is not None}


def _verdict(difference: float, better: Better) -> str:
    if better is None:
        return "higher" if difference > 0 else "lower"
    return "better" if (difference > 0) == (better == "higher") else "worse"


def _span(measure: Measure) -> float:
    low, high = measure.scale or (0.0, 1.0)
    return high - low


class _Needed:
    """How many prompts show a difference, by how much the prompts at hand differ.

    Args:
        differences: Of every pair.
        clusters: Prompt ids.
        is_rate: Whether verdicts are compared.
    """

    def __init__(self, differences: Any, clusters: Sequence[str], is_rate: bool) -> None:
        by_prompt: defaultdict[str, list[float]] = defaultdict(list)
        for prompt, difference in zip(clusters, differences, strict=True):
            by_prompt[prompt].append(float(difference))
        self._sd = float(np.std([np.mean(values) for values in by_prompt.values()], ddof=1))
        single = len(by_prompt) == len(clusters)
        self._discordant = float((differences != 0).mean()) if is_rate and single else None

    def prompts(self, difference: float) -> int | None:
        """None if there is no difference to see, or the prompts at hand do not vary."""
        if difference == 0 or not (self._discordant or self._sd):
            return None
        if self._discordant:
            return prompts_needed(difference, discordant_rate=self._discordant)
        return prompts_needed(difference, sd=self._sd)


def _words(found: Comparison) -> str:
    scale, unit, digits = (100, " points", 1) if found.is_rate else (1, "", 2)
    size = f"{abs(found.difference) * scale:.{digits}f}{unit}"
    gap = f"{size} {'higher' if found.difference > 0 else 'lower'}" if found.difference else "equal"
    bounds = f"{found.low * scale:+.{digits}f} to {found.high * scale:+.{digits}f}"
    left_out = f"; left out, not scored for both: {found.left_out:,} answers" if found.left_out else ""
    tail = {"within noise": "Within noise."}.get(found.verdict, f"This is {found.verdict}.")
    if found.verdict == "within noise" and found.needed is not None and found.needed > found.prompts:
        tail += f" About {found.needed:,} prompts would show a difference of this size."
    return (
        f"{variant_name(found.second)} against {variant_name(found.first)}, {found.task}, {found.title}: {gap} "
        f"({bounds}, p = {found.p:.2g}; {found.prompts} prompts{left_out}). {tail}"
    )
