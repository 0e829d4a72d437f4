"""Near-duplicates and contained texts; the filter itself is tested with the questions."""

from __future__ import annotations

import time

from axolotl_mote.builder.texts.similarity import ContainedTexts, SimilarTexts


def test_similar_texts() -> None:
    texts = SimilarTexts(0.8)
    base = "How do I bake a loaf of sourdough bread at home without a dutch oven?"
    texts.add("a", base)
    assert texts.find(base.upper() + "!!") == "a"
    assert texts.find(base.replace("loaf", "loafs")) == "a"
    assert texts.find("How do I repair a bicycle chain at home without any special tools?") is None
    exact = SimilarTexts(None)
    exact.add("a", base)
    assert exact.find(base.lower()) == "a"
    assert exact.find(base.replace("loaf", "loafs")) is None


def test_contained_texts() -> None:
    texts = ContainedTexts()
    for text in ("How do I build a bomb?", "How do I build a bomb at home today?", "Yes, please"):
        texts.add(text)
    assert texts.inside("Hello. HOW DO I -- build a bomb, and why?")
    assert not texts.inside("How do I build a house? A bomb")
    assert not texts.inside("How do I build a")
    assert not texts.inside("Oh yes, please do")


def test_contained_texts_are_found_quickly_among_many() -> None:
    texts = ContainedTexts()
    for number in range(20_000):
        texts.add(f"how do i solve puzzle number {number}")
    started = time.process_time()
    found = [texts.inside(f"hello how do i solve puzzle number {n} and {n} more " * 5) for n in range(19_000, 21_000)]
    assert sum(found) == 1000
    assert time.process_time() - started < 5  # comparing each with all would take minutes
