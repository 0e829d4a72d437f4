"""Near-duplicates and contained texts; the filter itself is tested with the questions."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from axolotl_mote.builder.texts import similarity
from axolotl_mote.builder.texts.similarity import ContainedTexts, SimilarTexts, normalize


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


class EveryPair:
    """The definition of ``SimilarTexts``: each text compared with every earlier one."""

    def __init__(self, threshold: float) -> None:
        self.threshold, self.rows = threshold, dict[str, tuple[str, str]]()

    def find(self, text: str, context: str) -> str | None:
        key = normalize(text), normalize(context)
        matches = (name for name, other in self.rows.items() if all(map(self.alike, key, other)))
        return next(matches, None) if key[0] else None

    def add(self, name: str, text: str, context: str) -> None:
        if normalize(text):
            self.rows[name] = normalize(text), normalize(context)

    def alike(self, one: str, other: str) -> bool:
        a, b = self.grams(one), self.grams(other)
        return one == other or len(a & b) / len(a | b) >= self.threshold

    @staticmethod
    @cache
    def grams(text: str) -> set[str]:
        return {text[i : i + 5] for i in range(max(1, len(text) - 4))} if text else set()


def texts_with_near_duplicates(seed: int) -> Iterator[tuple[str, str]]:
    """Texts and contexts: random, from templates, and edited copies of earlier ones."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdeéшо漢", k=draw.randint(1, 8))) for _ in range(200)]

    def phrase(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    templates, made = [phrase(50) for _ in range(4)], [("", "")]
    while True:
        text, context = draw.choice(made)
        kind = draw.random()
        if kind < 0.5:
            edited = text.split()
            for _ in range(draw.randint(0, len(edited) // 8 + 1)):
                place = draw.randint(0, len(edited))
                edited[place : place + draw.randint(0, 1)] = draw.choices(words, k=draw.randint(0, 1))
            text = " ".join(edited)
            context = draw.choice([context] * 3 + [f"{context} {phrase(1)}", ""])
        else:
            text = f"{draw.choice(templates)} {phrase(12)}" if kind < 0.75 else phrase(50)
            context = draw.choice(["", *templates])
        made.append((text, context))
        yield text, context


@pytest.mark.parametrize(("threshold", "count"), [(0.03, 60), (0.5, 150), (0.8, 700), (0.9, 300), (1.0, 150)])
def test_the_index_finds_what_comparing_every_pair_finds(threshold: float, count: int) -> None:
    """With 0.8 the index is rebuilt on the way."""
    index, every_pair, found = SimilarTexts(threshold), EveryPair(threshold), 0
    rows = texts_with_near_duplicates(count)
    for number in range(count):
        text, context = next(rows)
        match = index.find(text, context)
        assert match == every_pair.find(text, context)
        found += match is not None
        if match is None:
            index.add(str(number), text, context)
            every_pair.add(str(number), text, context)
    assert 0.1 * count < found < 0.99 * count


def test_what_texts_share_in_their_context_does_not_make_them_alike() -> None:
    texts = SimilarTexts(0.8)
    shared = INSTRUCTION
    texts.add("a", "How do owls hunt at night?", shared)
    assert texts.find("Why is tea so bitter?", shared) is None
    assert texts.find("how do owls hunt at night", shared) == "a"
    assert texts.find("How do owls hunt at night, then?", shared + "Yes.") == "a"
    assert texts.find("How do owls hunt at night?", "You are a pirate.") is None
    assert texts.find("How do owls hunt at night?") is None


def templated(draw: random.Random) -> tuple[str, str]:
    """An instruction that takes five sixths of the text: any two are just below a similarity of 0.8."""
    return f"{INSTRUCTION} {' '.join(draw.choices(WORDS, k=14))}", ""


def with_a_paragraph(draw: random.Random) -> tuple[str, str]:
    return f"{' '.join(draw.choices(WORDS, k=60))}. {INSTRUCTION}", ""


def after_one_history(draw: random.Random) -> tuple[str, str]:
    return " ".join(draw.choices(WORDS, k=9)), INSTRUCTION


def one_reply(draw: random.Random) -> tuple[str, str]:
    return "Yes, please go on and tell me more.", " ".join(draw.choices(WORDS, k=40))


WORDS = ["".join(random.Random(i).choices("abcdefghijklmnop", k=6)) for i in range(9000)]
INSTRUCTION = " ".join(random.Random(1).choices(WORDS, k=72))


@pytest.mark.parametrize("make", [templated, with_a_paragraph, after_one_history, one_reply])
def test_few_texts_are_compared_whatever_all_share(
    make: Callable[[random.Random], tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparing each of 1,500 texts with all that share something would read a million."""
    read, original = 0, similarity._grams

    def counted(text: str) -> object:
        nonlocal read
        read += 1
        return original(text)

    monkeypatch.setattr(similarity, "_grams", counted)
    texts, draw, found = SimilarTexts(0.8), random.Random(0), 0
    for number in range(1500):
        text = make(draw)
        if texts.find(*text):
            found += 1
        else:
            texts.add(str(number), *text)
    assert found < 15
    assert read < 20 * 1500


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("मेरा नाम की", "मेरा नाम का", False),  # vowel signs are marks, not letters
        ("ฉันไปตลาด", "ฉนไปตลาด", False),
        ("Cafe\u0301", "caf\u00e9", True),  # one text, composed in two ways
        ("cafe", "café", False),
        ("What?  Is THIS", "what is this!", True),
    ],
)
def test_normalized_texts_keep_their_marks(one: str, other: str, same: bool) -> None:
    assert (normalize(one) == normalize(other)) == same


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
