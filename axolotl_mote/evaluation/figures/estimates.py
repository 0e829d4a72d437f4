"""A mean with its 95 % interval, clustered by prompt, and its worst case.

It knows values of prompts, not where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from axolotl_mote.evaluation.figures.measures import Measure
from axolotl_mote.evaluation.statistics import Interval, bootstrap_interval, rate_interval, score_interval


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Args:
        value: NaN if nothing was scored.
        low, high: 95 % interval; NaN if nothing was scored.
        n: Answers scored.
        prompts: Different prompts among them.
        unscored: Answers that belong to the figure and have no value, missing ones included.
        worst: The value if all of them count against the system; None if that is not known.
    """

    value: float
    low: float
    high: float
    n: int
    prompts: int
    unscored: int = 0
    worst: float | None = None


def estimate(
    values: Sequence[tuple[str, float | None]],
    *,
    is_rate: bool = True,
    scale: tuple[float, float] | None = None,
    worst: float | None = None,
    missing: int = 0,
    seed: int = 0,
) -> Estimate:
    """The mean of values of prompts.

    Args:
        values: (prompt id, value); None: not scored.
        is_rate: Whether every value is 0 or 1.
        scale: Least and greatest value that there can be; None if it is not known.
        worst: What an unscored value counts at most against the system.
        missing: Further unscored values.
        seed: Seed of the bootstrap.
    """
    scored = [(prompt, value) for prompt, value in values if value is not None]
    unscored = len(values) - len(scored) + missing
    if not scored:
        bound = worst if unscored else None
        return Estimate(math.nan, math.nan, math.nan, 0, 0, unscored, bound)
    prompts, numbers = [p for p, _ in scored], np.array([v for _, v in scored])
    if is_rate and np.isin(numbers, (0.0, 1.0)).all():
        interval = rate_interval(numbers, prompts)
    elif scale is not None and scale[0] <= numbers.min() <= numbers.max() <= scale[1]:
        interval = score_interval(numbers, prompts, low=scale[0], high=scale[1], seed=seed)
    elif len(set(prompts)) > 1:
        interval = bootstrap_interval(numbers, prompts, seed=seed)
    else:
        interval = Interval(math.nan, math.nan)  # one prompt says nothing of others
    total = math.fsum(numbers)
    bound = None if worst is None else (total + worst * unscored) / (len(scored) + unscored)
    return Estimate(total / len(scored), interval.low, interval.high, len(scored), len(set(prompts)), unscored, bound)


def shown(found: Estimate, is_rate: bool = True, digits: int = 1) -> str:
    """An estimate as a person reads it: ``12.0 % (8.1 to 17.3)``; a dash if nothing was scored."""
    if not found.n:
        return "–"
    scale = 100 if is_rate else 1
    text = f"{found.value * scale:.{digits}f}{' %' if is_rate else ''}"
    if math.isnan(found.low):
        return text
    return f"{text} ({found.low * scale:.{digits}f} to {found.high * scale:.{digits}f})"


def shown_worst(measure: Measure, found: Estimate) -> str:
    """The worst case of an estimate; "" if nothing is unscored."""
    if not found.unscored:
        return ""
    if found.worst is None:
        return "unknown"
    return f"{found.worst * 100:.1f} %" if measure.is_rate else f"{found.worst:.2f}"
