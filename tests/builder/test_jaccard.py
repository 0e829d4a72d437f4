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


def test_a_search_that_is_cut_short_finds_nearly_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of 120 out of 2,000 elements: every element is in 6 % of them, so that none is rare."""
    draw = np.random.default_rng(0)
    sets = [np.sort(draw.choice(2000, 120, replace=False).astype(np.uint64) << np.uint64(44)) for _ in range(4000)]
    index = SetIndex(0.8, sets.__getitem__)
    for elements in sets:
        index.add(elements)
    whole = index.lookup(sets[0])[0]
    monkeypatch.setattr(module, "MOST_READ", 1500)
    found = candidates = 0
    for number, elements in enumerate(sets):
        lacking = elements[draw.permutation(120)[:107]]  # 107 of 120 and 13 others: Jaccard similarity 107/133 = 0.805
        asked = np.unique(np.r_[lacking, draw.choice(2000, 13).astype(np.uint64) << np.uint64(44)])
        read, search = index.lookup(asked)
        assert read <= 1500 < whole / 3
        numbers = search()
        candidates += len(numbers)
        found += number in index.possible(asked, numbers)
    assert found > 0.999 * len(sets)
    assert candidates < 300 * len(sets)
