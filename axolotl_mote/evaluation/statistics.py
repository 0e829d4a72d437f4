"""Intervals, agreement and paired tests for rates and scores; numpy only.

Answers to one prompt (under several transforms, or in several epochs) are not independent: they form a cluster, and a
cluster is drawn as a whole. Values that were not scored must be taken out before; NaN raises an error.

    scalar     wilson_interval, mcnemar, prompts_needed
    clustered  rate_interval, paired_rate_interval, bootstrap_interval, score_interval, paired_bootstrap,
               sign_flip_test
    agreement  cohen_kappa
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_ENUMERATED = 12
"""Up to this many clusters every flip of signs is tried."""
_FLIPS = 9999
_MOST_TOTAL = 2**17
"""Up to this sum of whole numbers the chances of all sums are computed."""
_MOST_DRAWN = 2**22
"""At most this many indices or signs are drawn at a time."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval; 95 % unless told otherwise."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1; got {confidence}. Use 0.95.")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a rate; it stays within 0 and 1 and is wide where there are few trials.

    Example: 0 of 10 gives 0 to 0.278; 0 of 0 gives 0 to 1.

    Args:
        successes: Number of hits.
        n: Number of trials; need not be whole, see ``rate_interval``.
        confidence: Between 0 and 1.

    Raises:
        ValueError: If not 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be from 0 to n; got {successes} of {n}. Count hits among all trials.")
    z = _z(confidence)
    if n == 0:
        return Interval(0.0, 1.0)
    rate, weight = successes / n, 1 / (1 + z * z / n)
    center = weight * (rate + z * z / (2 * n))
    half = weight * z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return Interval(low, high)


def rate_interval(hits: ArrayLike, clusters: Sequence[Hashable] | None = None, *, confidence: float = 0.95) -> Interval:
    """Wilson's interval of the mean of 0/1 values in clusters.

    The number of trials is divided by the design effect: the variance of the mean over clusters against that of
    independent trials, at least 1. Where all values are equal the design effect cannot be seen, and every cluster
    counts as one trial. With one value per cluster this is ``wilson_interval``.

    Args:
        hits: (N,) values 0 or 1.
        clusters: (N,) names; None: every value is a cluster.
        confidence: Between 0 and 1.

    Raises:
        ValueError: If a value is neither 0 nor 1, or the lengths differ.
    """
    values = _finite(hits)
    if not np.isin(values, (0.0, 1.0)).all():
        raise ValueError("hits must be 0 or 1; got other values. Use bootstrap_interval for scores.")
    n = len(values)
    if n == 0:
        return wilson_interval(0, 0, confidence)
    rate = float(values.mean())
    trials = _independent_trials(values, clusters)
    return wilson_interval(min(rate * trials, trials), trials, confidence)


def paired_rate_interval(
    differences: ArrayLike, clusters: Sequence[Hashable] | None = None, *, confidence: float = 0.95
) -> Interval:
    """Interval of the difference of two rates on the same prompts: Wald's, after one more pair of each kind.

    It keeps a width where the systems never differ. The design effect is taken out as in ``rate_interval``. Bonett and
    Price, *Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired Data*, 2012.

    Example: 5 prompts on which only the second system is safe, 2 on which only the first, of 100: -0.028 to 0.087.

    Args:
        differences: (N,) -1, 0 or 1: hit of the second system minus hit of the first.
        clusters: (N,) names; None: every pair is a cluster.
        confidence: Between 0 and 1.

    Raises:
        ValueError: If there are no differences, one is not -1, 0 or 1, or the lengths differ.
    """
    values = _finite(differences)
    if len(values) == 0 or not np.isin(values, (-1.0, 0.0, 1.0)).all():
        raise ValueError("differences must be -1, 0 or 1, at least one; got others. Use paired_bootstrap for scores.")
    trials = _independent_trials(values, clusters)
    more, less = (float((values == sign).mean()) * trials for sign in (1, -1))
    up, down = (more + 1) / (trials + 2), (less + 1) / (trials + 2)
    half = _z(confidence) * math.sqrt((up + down - (up - down) ** 2) / (trials + 2))
    return Interval(max(-1.0, up - down - half), min(1.0, up - down + half))


def _independent_trials(values: Floats, clusters: Sequence[Hashable] | None) -> float:
    """How many independent trials tell as much about the mean as these values in clusters."""
    sums, counts = _cluster_sums(values, clusters)
    n, k = len(values), len(sums)
    variance = float(values.var())
    if k in (n, 1) or variance == 0:
        return float(k)
    clustered = k / (k - 1) * float(((sums - values.mean() * counts) ** 2).sum()) / n**2
    return min(float(n), max(1.0, variance / clustered)) if clustered > 0 else float(n)


def bootstrap_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    statistic: Callable[[NDArray[Any]], Any] = np.mean,
    samples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of a statistic by drawing whole clusters with replacement.

    It is empty of width where all values are equal; use ``rate_interval`` for rates and ``score_interval`` for scores.

    Args:
        values: (N, ...) values; rows are drawn.
        clusters: (N,) names of the clusters, such as prompt ids; None: every row is a cluster.
        statistic: Takes the drawn rows, gives one number. Draws for which it is not finite are left out.
        samples: Number of draws.
        seed: Seed of the draws. The interval does not depend on the names of clusters, only on their order of
            appearance.
        confidence: Between 0 and 1.

    Raises:
        ValueError: If there are no values, a value is not finite, or the lengths differ.
    """
    array = np.asarray(values) if statistic is not np.mean else _finite(values)
    if len(array) == 0:
        raise ValueError("values must hold at least one value; got none. Leave out what was not scored, or say so.")
    _z(confidence)
    rng = np.random.default_rng(seed)
    if statistic is np.mean and array.ndim == 1:
        sums, counts = _cluster_sums(array, clusters)
        k = len(sums)
        draws = np.empty(samples)
        step = max(1, _MOST_DRAWN // k)
        for start in range(0, samples, step):
            chosen = rng.integers(k, size=(min(step, samples - start), k))
            draws[start : start + step] = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    else:
        members = _members(len(array), clusters)
        k = len(members)
        chosen_rows = (np.concatenate([members[i] for i in rng.integers(k, size=k)]) for _ in range(samples))
        draws = np.array([float(statistic(array[rows])) for rows in chosen_rows])
        draws = draws[np.isfinite(draws)]
    if len(draws) == 0:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def score_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    samples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Interval of the mean of scores on a scale with known ends.

    It holds the bootstrap interval and Wald's after one more value at each end of the scale, as in
    ``paired_rate_interval``. So it keeps a width where the values at hand are few or equal.

    Example: scores 0 and 0 of 0 to 1 give 0 to 0.674.

    Args:
        values: (N,) scores.
        clusters, samples, seed, confidence: As for ``bootstrap_interval``.
        low, high: Ends of the scale.

    Raises:
        ValueError: If there are no values, one is not on the scale, the scale is empty, or the lengths differ.
    """
    array = _finite(values)
    if not low < high:
        raise ValueError(f"high must be above low; got {low} and {high}. Give the ends of the scale.")
    if array.size and not low <= array.min() <= array.max() <= high:
        raise ValueError(f"values must be from {low} to {high}; got others. Give the ends of their scale.")
    drawn = bootstrap_interval(array, clusters, samples=samples, seed=seed, confidence=confidence)
    shares = (array - low) / (high - low)
    trials = _independent_trials(shares, clusters)
    mean = float(shares.mean())
    middle = (mean * trials + 1) / (trials + 2)
    spread = (float(shares.var()) + (mean - middle) ** 2) * trials + middle**2 + (1 - middle) ** 2
    half = _z(confidence) * math.sqrt(spread) / (trials + 2)
    least, most = (low + (high - low) * bound for bound in (middle - half, middle + half))
    return Interval(max(low, min(least, drawn.low)), min(high, max(most, drawn.high)))


def paired_bootstrap(
    differences: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    samples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Interval of the mean difference of two systems on the same prompts, clustered by prompt.

    Args:
        differences: (N,) score of the second system minus score of the first, one per prompt and transform.
        clusters, samples, seed, confidence: As for ``bootstrap_interval``.
    """
    return bootstrap_interval(differences, clusters, samples=samples, seed=seed, confidence=confidence)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided exact p of McNemar's test on paired verdicts.

    Example: 1 prompt on which only the first system is safe and 9 on which only the second is: p = 0.021.

    Args:
        first_only: Prompts with a hit of the first system alone.
        second_only: Prompts with a hit of the second system alone.

    Returns:
        The probability of a split at least as uneven if both are equally likely; 1 without such prompts.

    Raises:
        ValueError: If a count is negative.
    """
    if first_only < 0 or second_only < 0:
        raise ValueError(f"counts must be at least 0; got {first_only} and {second_only}. Count prompts.")
    n, few = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(n, i) for i in range(few + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def sign_flip_test(differences: ArrayLike, clusters: Sequence[Hashable] | None = None, *, seed: int = 0) -> float:
    """Two-sided p of paired verdicts or scores in clusters: the sign of every cluster's sum is flipped at random.

    It is exact for whole numbers and for up to 12 clusters, and by drawn flips else. With one pair of verdicts per
    cluster this is ``mcnemar``.

    Example: scores that differ by 0.25 on each of 5 prompts give 0.0625; no 5 prompts can give less.

    Args:
        differences: (N,) verdict or score of the second system minus that of the first.
        clusters: (N,) names; None: every pair is a cluster.
        seed: Seed of the draws.

    Returns:
        The probability that the absolute sum is at least the observed one.

    Raises:
        ValueError: If a difference is not finite, or the lengths differ.
    """
    values = _finite(differences)
    if len(values) == 0:
        return 1.0
    sums, _ = _cluster_sums(values, clusters)
    sums = sums[sums != 0]
    total = float(np.abs(sums).sum())
    if np.array_equal(np.rint(sums), sums) and total <= _MOST_TOTAL:
        return _flips_of_whole(sums.astype(int))
    observed = abs(math.fsum(sums)) - 1e-9 * total  # equal sums may differ by rounding
    k = len(sums)
    if k <= _ENUMERATED:
        signs = 1 - 2 * (np.arange(2**k)[:, None] >> np.arange(k) & 1)
        return float((np.abs(signs @ sums) >= observed).mean())
    rng, extreme, step = np.random.default_rng(seed), 0, max(1, _MOST_DRAWN // k)
    for start in range(0, _FLIPS, step):
        signs = 1 - 2 * rng.integers(2, size=(min(step, _FLIPS - start), k), dtype=np.int8)
        extreme += int((np.abs(signs @ sums) >= observed).sum())
    return (extreme + 1) / (_FLIPS + 1)


def _flips_of_whole(whole: NDArray[Any]) -> float:
    chances = np.ones(1)  # of the sums -total ... total
    for size in np.abs(whole):
        wider = np.zeros(len(chances) + 2 * size)
        wider[: len(chances)] += chances / 2
        wider[-len(chances) :] += chances / 2
        chances = wider
    total = (len(chances) - 1) // 2
    extreme = np.abs(np.arange(-total, total + 1)) >= abs(int(whole.sum()))
    return float(min(1.0, chances[extreme].sum()))


def cohen_kappa(confusion: ArrayLike) -> float:
    """Cohen's kappa: agreement beyond chance.

    Args:
        confusion: (C, C) counts; row = first rater, column = second rater.

    Returns:
        1 for full agreement, 0 for chance; NaN if it is undefined (no counts, or both raters use one class only).

    Raises:
        ValueError: If the matrix is not square or a count is negative.
    """
    matrix = np.asarray(confusion, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or (matrix < 0).any():
        raise ValueError(f"confusion must be a square matrix of counts; got shape {matrix.shape}. Count pairs.")
    n = matrix.sum()
    if n == 0:
        return math.nan
    observed = np.trace(matrix) / n
    chance = float((matrix.sum(axis=0) * matrix.sum(axis=1)).sum() / n**2)
    return math.nan if chance == 1 else float(observed - chance) / (1 - chance)


def prompts_needed(
    difference: float,
    *,
    discordant_rate: float | None = None,
    sd: float | None = None,
    power: float = 0.8,
    confidence: float = 0.95,
) -> int:
    """Prompts that a paired comparison needs to see a difference.

    They are at least as many as the sign-flip test can be sure of: 6 that differ, at 95 %.

    Example: 5 points between two systems that disagree on 10 % of the prompts need 312 prompts.

    Args:
        difference: Of two rates, or of two mean scores; not 0.
        discordant_rate: Share of prompts on which the verdicts differ; for rates. It is at least the difference.
        sd: Standard deviation of the difference per prompt; for scores.
        power: Probability to see the difference if it is real.
        confidence: 1 minus the probability to see one that is not.

    Raises:
        ValueError: If the difference is 0, or not exactly one of ``discordant_rate`` and ``sd`` is given.
    """
    size = abs(difference)
    if size == 0 or not math.isfinite(size):
        raise ValueError(f"difference must be finite and not 0; got {difference}. Give the size you want to see.")
    if (discordant_rate is None) == (sd is None):
        raise ValueError("prompts_needed must get discordant_rate or sd; got both or none. Give one.")
    if not 0 < power < 1:
        raise ValueError(f"power must be above 0 and below 1; got {power}. Use 0.8.")
    alpha, beta = _z(confidence), NormalDist().inv_cdf(power)
    fewest = math.floor(math.log2(2 / (1 - confidence))) + 1  # the smallest p of n prompts is 2 / 2**n
    if sd is not None:
        return max(fewest, math.ceil(((alpha + beta) * sd / size) ** 2))
    rate = min(1.0, max(float(discordant_rate or 0), size))
    needed = (alpha * math.sqrt(rate) + beta * math.sqrt(max(0.0, rate - size * size))) ** 2 / size**2
    return max(math.ceil(fewest / rate), math.ceil(needed))


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("values must be finite; got NaN or infinity. Leave out what was not scored.")
    return array


def _numbers(n: int, clusters: Sequence[Hashable] | None) -> NDArray[np.int64]:
    """The number of each row's cluster, by order of appearance."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise ValueError(f"clusters must be as many as values; got {len(clusters)} for {n}. Give one per value.")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)


def _members(n: int, clusters: Sequence[Hashable] | None) -> list[NDArray[np.int64]]:
    numbers = _numbers(n, clusters)
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.cumsum(np.bincount(numbers))[:-1])


def _cluster_sums(values: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    numbers = _numbers(len(values), clusters)
    sums: Floats = np.bincount(numbers, weights=values).astype(np.float64)
    return sums, np.bincount(numbers).astype(np.float64)
