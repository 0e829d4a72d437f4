"""The index of sets at its bounds; test_similarity.py compares it with comparing every pair."""

from __future__ import annotations

import numpy as np
import pytest

from axolotl_mote.builder.texts import jaccard as module
from axolotl_mote.builder.texts.jaccard import Set, SetIndex, jaccard

WHOLE = np.arange(400, dtype=np.uint64)
PART = WHOLE[80:]
"""The last 320 elements of 400: similar by 0.8, and the first that both hold is the last one of the bound."""


@pytest.mark.parametrize(("stored", "asked"), [(PART, WHOLE), (WHOLE, PART)])
@pytest.mark.parametrize(("copies", "others"), [(1, 0), (1, 200), (300, 0), (300, 2000)])
def test_sets_that_just_reach_the_threshold_are_found(stored: Set, asked: Set, copies: int, others: int) -> None:
    """Few or many sets, few or many of which share an element with the one asked for."""
    sets = [stored] * copies + [WHOLE + np.uint64(1000 * (number + 1)) for number in range(others)]
    index = SetIndex(0.8, sets.__getitem__)
    for elements in sets:
        index.add(elements)
    assert jaccard(stored, asked) == 0.8
    found = index.possible(asked, index.lookup(asked)[1]())
    assert found.tolist() == list(range(copies))


@pytest.mark.parametrize(("universe", "spread", "left"), [(2000, 0.0, 0.2), (300, 0.2, 0.6)])
def test_a_search_that_is_cut_short_finds_nearly_all(
    universe: int, spread: float, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets of elements of which none is rare, of one size or of many."""
    draw = np.random.default_rng(0)

    def elements_of(count: int) -> Set:
        return draw.choice(universe, count, replace=False).astype(np.uint64) << np.uint64(44)

    sizes = (universe // 20 * np.exp(draw.uniform(-spread, spread, 4000))).astype(int) + 45
    sets = [np.sort(elements_of(size)) for size in sizes]
    index = SetIndex(0.8, sets.__getitem__)
    for elements in sets:
        index.add(elements)
    whole = sum(index.lookup(elements)[0] for elements in sets)
    monkeypatch.setattr(module, "MOST_READ", 1000)
    found = candidates = total = 0
    for number, elements in enumerate(sets):
        kept = -(-8 * len(elements) // 9)  # of n elements 8/9, and as many others: Jaccard similarity of 0.8
        others = np.setdiff1d(elements_of(universe // 2), elements)[: len(elements) - kept]
        asked = np.sort(np.r_[draw.permutation(elements)[:kept], others])
        assert jaccard(asked, elements) >= 0.8
        read, search = index.lookup(asked)
        total += read
        numbers = search()
        candidates += len(numbers)
        found += number in index.possible(asked, numbers)
    assert total < 0.8 * whole
    assert found > 0.998 * len(sets)
    assert candidates < left * len(sets) * len(sets)
