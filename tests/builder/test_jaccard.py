"""The index of sets at its bounds; test_similarity.py compares it with comparing every pair."""

from __future__ import annotations

import numpy as np
import pytest

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
