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


def test_the_time_to_find_a_contained_text_hardly_depends_on_how_many_there_are() -> None:
    """40 times as many texts; comparing each with all would take 40 times as long."""
    few, many = (seconds_to_search(count) for count in (500, 20_000))
    assert many < 5 * few


def seconds_to_search(count: int) -> float:
    """CPU time of 1000 searches among so many texts, the best of three."""
    texts = ContainedTexts()
    for number in range(count):
        texts.add(f"how do i solve puzzle number {number}")
    questions = [f"hello how do i solve puzzle number {n} and {n} more " * 5 for n in range(count - 500, count + 500)]
    times = []
    for _ in range(3):
        started = time.process_time()
        assert sum(map(texts.inside, questions)) == 500
        times.append(time.process_time() - started)
    return min(times)
