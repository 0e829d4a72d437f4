"""Intervals and tests against exact enumeration, definitions solved by search, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_mote.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    cohen_kappa,
    mcnemar,
    paired_bootstrap,
    paired_rate_interval,
    prompts_needed,
    rate_interval,
    score_interval,
    sign_flip_test,
    wilson_interval,
)

Z = 1.959963984540054


@settings(deadline=None)
@given(n=st.integers(1, 400), data=st.data())
def test_wilson_bounds_solve_the_score_equation(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    interval = wilson_interval(successes, n)
    rate = successes / n
    assert 0 <= interval.low <= rate <= interval.high <= 1
    for bound in (interval.low, interval.high):
        if 0 < bound < 1:  # the rate lies exactly z standard errors from either bound
            assert abs(rate - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)


def test_wilson_ends() -> None:
    assert wilson_interval(0, 0) == Interval(0, 1)
    assert wilson_interval(0, 10).low == 0
    assert wilson_interval(10, 10).high == 1
    assert wilson_interval(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert wilson_interval(5, 10, 0.5).high < wilson_interval(5, 10, 0.95).high


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (math.nan, 3)])
def test_impossible_counts_are_refused(successes: float, n: int) -> None:
    with pytest.raises(ValueError, match=r"^successes must be from 0 to n; got "):
        wilson_interval(successes, n)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"^confidence must be above 0 and below 1"):
        wilson_interval(1, 2, confidence)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_rate_without_clusters_is_wilsons(hits: list[bool]) -> None:
    assert rate_interval(hits) == wilson_interval(sum(hits), len(hits))
    assert rate_interval(hits, [f"p{i}" for i in range(len(hits))]) == rate_interval(hits)


def test_copies_of_a_prompt_add_no_certainty() -> None:
    hits = [1, 0, 0, 1, 1, 0, 1, 0, 0, 0]
    once = rate_interval(hits)
    five_times = rate_interval(np.repeat(hits, 5), np.repeat(np.arange(10), 5).tolist())
    assert five_times.high - five_times.low == pytest.approx(once.high - once.low, rel=0.1)
    assert rate_interval(np.repeat(hits, 5)).high < five_times.high
    assert rate_interval([0] * 30, [0, 1, 2] * 10) == wilson_interval(0, 3)
    assert rate_interval([1, 0, 1, 0], ["a"] * 4) == wilson_interval(0.5, 1)


def test_rate_intervals_hold_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        chance = rng.beta(2, 2, size=40)  # mean 0.5; answers to one prompt resemble each other
        hits = (rng.random((40, 4)) < chance[:, None]).astype(float)
        held += 0.5 in rate_interval(hits.ravel(), np.repeat(np.arange(40), 4).tolist())
    assert 0.91 <= held / 400 <= 0.99


def test_rates_take_zeros_and_ones_only() -> None:
    with pytest.raises(ValueError, match=r"^hits must be 0 or 1"):
        rate_interval([0.5])


def test_bootstrap_against_all_draws() -> None:
    values, clusters = [1.0, 2.0, 4.0, 8.0], ["a", "a", "b", "c"]
    groups = [[1.0, 2.0], [4.0], [8.0]]
    means = [np.mean([v for g in draw for v in g]) for draw in itertools.product(groups, repeat=3)]
    low, high = np.quantile(means, [0.1, 0.9])
    found = bootstrap_interval(values, clusters, samples=20000, confidence=0.8)
    assert found.low == pytest.approx(low, abs=0.1)
    assert found.high == pytest.approx(high, abs=0.1)


def test_a_general_statistic_gives_what_the_fast_mean_gives() -> None:
    values, clusters = np.random.default_rng(1).normal(size=60), [i % 17 for i in range(60)]
    fast = bootstrap_interval(values, clusters)
    slow = bootstrap_interval(values, clusters, statistic=lambda rows: float(rows.mean()))
    assert (slow.low, slow.high) == pytest.approx((fast.low, fast.high), abs=0.05)
    pairs = np.stack([values, values], axis=1)  # rows are drawn whole
    assert bootstrap_interval(pairs, statistic=lambda rows: np.abs(rows[:, 0] - rows[:, 1]).max()) == Interval(0, 0)


def test_bootstrap_is_seeded_and_knows_no_names() -> None:
    values = np.arange(20.0)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, list("abcdefghijklmnopqrst")) == bootstrap_interval(values)


def test_many_clusters_are_drawn_in_parts() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    interval = bootstrap_interval(values)
    error = 1.96 * values.std() / math.sqrt(5000)
    assert interval.high - interval.low == pytest.approx(2 * error, rel=0.1)


def test_bootstrap_of_nothing_or_of_unscored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^values must hold at least one"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match=r"^values must be finite"):
        bootstrap_interval([1.0, math.nan])
    with pytest.raises(ValueError, match=r"^clusters must be as many as values; got 1 for 2"):
        bootstrap_interval([1.0, 2.0], ["a"])
    undefined = bootstrap_interval([1.0], statistic=lambda rows: math.nan)
    assert math.isnan(undefined.low)


def test_paired_bootstrap_is_narrow_where_systems_move_together() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=200)
    second = first + 0.2 + 0.1 * rng.normal(size=200)
    assert 0 not in paired_bootstrap(second - first)
    assert 0.2 in paired_bootstrap(second - first)


def test_paired_rate_intervals_hold_what_they_promise() -> None:
    rng, held, held_clustered = np.random.default_rng(0), 0, 0
    for _ in range(400):
        pairs = rng.choice([-1, 0, 1], p=[0.05, 0.8, 0.15], size=60)
        held += 0.1 in paired_rate_interval(pairs)
        held_clustered += 0.1 in paired_rate_interval(np.repeat(pairs, 4), np.repeat(np.arange(60), 4).tolist())
    assert 0.92 <= held / 400 <= 0.99
    assert 0.92 <= held_clustered / 400 <= 0.99


def test_paired_rate_interval_by_hand_and_at_its_ends() -> None:
    found = paired_rate_interval([1] * 5 + [-1] * 2 + [0] * 93)
    up, down, n = 6 / 102, 3 / 102, 102
    half = Z * math.sqrt((up + down - (up - down) ** 2) / n)
    assert (found.low, found.high) == pytest.approx((up - down - half, up - down + half))
    same = paired_rate_interval([0] * 20)
    assert same.low == -same.high < 0
    assert paired_rate_interval([1.0]).high <= 1
    for wrong in ([], [0.5]):
        with pytest.raises(ValueError, match=r"^differences must be -1, 0 or 1"):
            paired_rate_interval(wrong)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_by_enumeration(first: int, second: int) -> None:
    n, gap = first + second, abs(first - second)
    splits = [abs(2 * sum(flips) - n) for flips in itertools.product((0, 1), repeat=min(n, 12))] if n <= 12 else []
    if splits:
        assert mcnemar(first, second) == pytest.approx(sum(s >= gap for s in splits) / len(splits))
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_at_its_ends() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 9) == pytest.approx(0.021484375)
    assert mcnemar(3000, 0) == 0.0  # far below the smallest float, and no overflow
    with pytest.raises(ValueError, match=r"^counts must be at least 0"):
        mcnemar(-1, 0)


@settings(deadline=None)
@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=40))
def test_sign_flips_of_single_pairs_are_mcnemar(differences: list[int]) -> None:
    expected = mcnemar(differences.count(-1), differences.count(1))
    assert sign_flip_test(differences) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([-1, 0, 1])), min_size=1, max_size=24))
def test_sign_flips_of_clusters_by_enumeration(pairs: list[tuple[int, int]]) -> None:
    sums: dict[int, int] = {}
    for cluster, difference in pairs:
        sums[cluster] = sums.get(cluster, 0) + difference
    observed = abs(sum(sums.values()))
    flips = list(itertools.product((-1, 1), repeat=len(sums)))
    extreme = sum(abs(sum(s * v for s, v in zip(signs, sums.values(), strict=True))) >= observed for signs in flips)
    found = sign_flip_test([d for _, d in pairs], [c for c, _ in pairs])
    assert found == pytest.approx(extreme / len(flips), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(-8, 8)), min_size=1, max_size=24))
def test_sign_flips_of_scores_by_enumeration(pairs: list[tuple[int, int]]) -> None:
    """The scale does not matter, though a tenth has no exact float: ties stay ties."""
    clusters = [cluster for cluster, _ in pairs]
    exact = sign_flip_test([number for _, number in pairs], clusters)
    assert sign_flip_test([number / 10 for _, number in pairs], clusters) == pytest.approx(exact, abs=1e-12)


def test_drawn_sign_flips_are_near_the_exact_ones() -> None:
    whole = np.random.default_rng(0).integers(-8, 12, size=40)
    exact = sign_flip_test(whole)
    assert 0.01 < exact < 0.9
    drawn = sign_flip_test(whole / 10)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999))
    assert drawn == sign_flip_test(whole / 10)  # seeded
    assert sign_flip_test([0.3] * 400) == 1e-4  # never 0
    assert sign_flip_test([2.0**40] * 13) == pytest.approx(2 / 2**13, abs=2e-4)  # no table of all sums


def test_sign_flips_at_their_ends() -> None:
    assert sign_flip_test([]) == sign_flip_test([0.0, 0.0]) == sign_flip_test([0.5]) == 1
    assert sign_flip_test([0.25] * 5) == 0.0625
    with pytest.raises(ValueError, match=r"^values must be finite"):
        sign_flip_test([math.nan])


@pytest.mark.parametrize("prompts", [2, 5, 12, 50])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.95])
def test_intervals_of_scores_hold_what_they_promise(prompts: int, zeros: float) -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        values = 1 + (rng.random(prompts) >= zeros) * rng.integers(1, 10, size=prompts)  # 1 to 10
        held += 1 + 5 * (1 - zeros) in score_interval(values, low=1, high=10, samples=200)
    assert held / 300 >= 0.93


def test_intervals_of_scores_at_their_ends() -> None:
    nothing = score_interval([0.0, 0.0])
    assert nothing.low == 0
    assert nothing.high == pytest.approx(0.25 + 1.959964 * math.sqrt(0.75) / 4)  # of 0, 0 and the ends: 0, 1
    assert score_interval([1.0]).low == pytest.approx(2 / 3 - 1.959964 * math.sqrt(2 / 3) / 3)
    in_clusters = score_interval([10.0] * 6, list("aabbcc"), low=1, high=10)
    assert in_clusters == score_interval([10.0] * 3, low=1, high=10)
    values = np.random.default_rng(0).normal(6, 1, 400).clip(1, 10)
    many, drawn = score_interval(values, low=1, high=10), bootstrap_interval(values)
    assert many.high - many.low < 1.1 * (drawn.high - drawn.low)
    for values, ends, message in (
        ([], (0, 1), "values must hold"),
        ([2.0], (0, 1), "values must be from 0 to 1"),
        ([1.0], (1, 1), "high must be above low"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            score_interval(values, low=ends[0], high=ends[1])


def test_kappa() -> None:
    assert cohen_kappa([[20, 5], [10, 15]]) == pytest.approx(0.4)
    assert cohen_kappa(np.eye(3) * 4) == pytest.approx(1)
    assert cohen_kappa([[1, 1], [1, 1]]) == pytest.approx(0)
    assert math.isnan(cohen_kappa(np.zeros((3, 3))))
    assert math.isnan(cohen_kappa([[7, 0], [0, 0]]))
    with pytest.raises(ValueError, match=r"^confusion must be a square matrix"):
        cohen_kappa([[1, 2, 3]])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=50).filter(
        lambda pairs: len({c for pair in pairs for c in pair}) > 1
    )
)
def test_kappa_against_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    matrix = np.zeros((3, 3))
    for first, second in pairs:
        matrix[first, second] += 1
    expected = metrics.cohen_kappa_score([f for f, _ in pairs], [s for _, s in pairs])
    assert cohen_kappa(matrix) == pytest.approx(expected)


def test_the_number_of_prompts_sees_the_difference_as_often_as_promised() -> None:
    needed = prompts_needed(0.1, discordant_rate=0.2)
    rng, seen = np.random.default_rng(0), 0
    for _ in range(1000):
        better, worse, _ = rng.multinomial(needed, [0.15, 0.05, 0.8])
        seen += mcnemar(worse, better) < 0.05
    assert 0.72 <= seen / 1000 <= 0.86  # the exact test is a little cautious


def test_the_number_of_prompts_for_scores() -> None:
    needed = prompts_needed(0.5, sd=2.0)
    rng = np.random.default_rng(0)
    differences = rng.normal(0.5, 2.0, size=(2000, needed))
    errors = differences.std(axis=1, ddof=1) / math.sqrt(needed)
    assert np.mean(np.abs(differences.mean(axis=1)) > 1.96 * errors) == pytest.approx(0.8, abs=0.03)


def test_what_prompts_needed_refuses() -> None:
    assert prompts_needed(-0.05, discordant_rate=0.1) == prompts_needed(0.05, discordant_rate=0.1) == 312
    assert prompts_needed(0.3, discordant_rate=0.1) == prompts_needed(0.3, discordant_rate=0.3)
    assert mcnemar(0, 5) > 0.05 > mcnemar(0, 6)
    assert prompts_needed(1.0, discordant_rate=0.0) == prompts_needed(9.0, sd=0.1) == 6
    assert prompts_needed(1.0, discordant_rate=1.0, confidence=0.99) == 8
    for rate in (0.3, 0.6, 0.9):
        assert prompts_needed(rate, discordant_rate=rate) * rate >= 6
    for arguments in ({}, {"discordant_rate": 0.1, "sd": 1.0}):
        with pytest.raises(ValueError, match=r"^prompts_needed must get discordant_rate or sd"):
            prompts_needed(0.1, **arguments)
    with pytest.raises(ValueError, match=r"^difference must be finite and not 0"):
        prompts_needed(0, sd=1)
    with pytest.raises(ValueError, match=r"^power must be"):
        prompts_needed(0.1, sd=1, power=1)
