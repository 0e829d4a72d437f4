"""Which texts are the same, nearly the same, or contained in another; the filter against evaluation prompts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache, partial
from operator import itemgetter

import numpy as np

from axolotl_mote.builder.texts.jaccard import Set, SetIndex, distinct, jaccard
from axolotl_mote.chain.questions import Messages

# Odd numbers without a pattern: one for each letter of a 5-gram.
_FACTORS = np.array(
    [0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB],
    dtype=np.uint64,
)


# Vowel signs and accents belong to their letters; \w leaves them out. The scripts that write them lie in this range.
_MAY_HAVE_MARKS = re.compile("[\u0300-\u1dff]")
_MARKS = "".join(c for c in map(chr, range(0x300, 0x1E00)) if unicodedata.category(c).startswith("M"))
_LONGEST_WORD = 100
_WORD, _WORD_WITH_MARKS = re.compile(r"\w+"), re.compile(f"[\\w{_MARKS}]+")


def normalize(text: str) -> str:
    """Lower case, letters and digits only, one space between words: texts that agree in this count as identical."""
    text = text.lower()
    if not _MAY_HAVE_MARKS.search(text):
        return " ".join(_WORD.findall(text))  # many times as fast
    return " ".join(_composed(word) for word in _WORD_WITH_MARKS.findall(text))


def _composed(word: str) -> str:
    # To sort a long run of marks, as normalization does, takes quadratic time; no language has such words.
    return unicodedata.normalize("NFC", word) if len(word) <= _LONGEST_WORD else word


class SimilarTexts:
    """Finds an earlier text that is nearly the same, in a time that hardly depends on how many there are.

    Two texts are nearly the same if the Jaccard similarity of their sets of character 5-grams, normalized, reaches the
    threshold. Where a text has a context, such as the turns before it, the contexts must be nearly the same, too: what
    they share does not make the texts alike. Texts that differ only in case and punctuation always match. The decision
    is exact but for 64-bit hashes of the 5-grams, and for the bound of ``jaccard.MOST_READ``.

    Args:
        threshold: Jaccard similarity from which two texts count as the same; None: only identical texts do.
    """

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold
        self._exact: dict[tuple[str, str], str] = {}
        self._names: list[str] = []
        self._keys: list[tuple[str, str]] = []  # text, context
        if threshold is not None:
            self._indexes = [SetIndex(threshold, partial(self._set, part)) for part in (0, 1)]
            # Where all texts share something, most are compared with the same few.
            self._compared: Callable[[int, int], Set] = lru_cache(maxsize=2048)(self._set)

    def find(self, text: str, context: str = "") -> str | None:
        """Name of an earlier text that is nearly the same, or None."""
        key = normalize(text), normalize(context)
        if key in self._exact or self._threshold is None or not key[0]:
            return self._exact.get(key)
        sets = [_grams(part) for part in key]
        searches = [index.lookup(part) for index, part in zip(self._indexes, sets, strict=True) if len(part)]
        numbers = min(searches, key=itemgetter(0))[1]()
        for index, part in zip(self._indexes, sets, strict=True):
            numbers = index.possible(part, numbers)
        for number in map(int, numbers):
            if all(jaccard(part, self._compared(i, number)) >= self._threshold for i, part in enumerate(sets)):
                return self._names[number]
        return None

    def add(self, name: str, text: str, context: str = "") -> None:
        """Remember a text; of several identical texts the first keeps its name."""
        key = normalize(text), normalize(context)
        if key in self._exact or not key[0]:
            return
        self._exact[key] = name
        if self._threshold is not None:
            self._names.append(name)
            self._keys.append(key)
            for index, part in zip(self._indexes, key, strict=True):
                index.add(_grams(part))

    def _set(self, part: int, number: int) -> Set:
        return _grams(self._keys[number][part])


class ContainedTexts:
    """Finds remembered texts word for word inside others, in time that hardly depends on how many are remembered.

    Texts of fewer than three words are not remembered: "Yes." can occur in any text.
    """

    def __init__(self) -> None:
        self._texts: set[tuple[str, ...]] = set()
        self._lengths: dict[tuple[str, ...], set[int]] = {}  # by their first three words

    def add(self, text: str) -> None:
        """Remember a text."""
        words = tuple(normalize(text).split())
        if len(words) >= 3:
            self._texts.add(words)
            self._lengths.setdefault(words[:3], set()).add(len(words))

    def inside(self, text: str) -> bool:
        """True if this text contains a remembered one; case and punctuation do not count."""
        words = tuple(normalize(text).split())
        return any(
            words[i : i + length] in self._texts
            for i in range(len(words) - 2)
            for length in self._lengths.get(words[i : i + 3], ())
        )


class ContaminationFilter:
    """Evaluation prompts that must not be trained on.

    A question matches if it is an evaluation prompt or contains one:

    - all its user turns together, or one of its turns of three or more words, are the same as a prompt, or nearly;
    - its user turns contain a prompt of three or more words, word for word.

    Shorter turns and prompts are compared as a whole only: "Yes." can occur in both.

    Args:
        threshold: Jaccard similarity from which two texts are nearly the same.
    """

    def __init__(self, threshold: float) -> None:
        self._similar, self._contained, self._count = SimilarTexts(threshold), ContainedTexts(), 0

    def add(self, messages: Messages) -> None:
        """Remember an evaluation prompt."""
        self._count += 1
        self._similar.add(str(self._count), _user_text(messages))
        self._contained.add(_user_text(messages))

    def matches(self, messages: Messages) -> bool:
        """True if a question must not be trained on."""
        if not self._count:
            return False
        turns = [turn["content"] for turn in messages if turn["role"] == "user" and len(turn["content"].split()) >= 3]
        whole = _user_text(messages)
        return self._contained.inside(whole) or any(map(self._similar.find, [whole, *turns]))


def _user_text(messages: Messages) -> str:
    return "\n".join(turn["content"] for turn in messages if turn["role"] == "user")


@lru_cache(maxsize=4)
def _grams(text: str) -> Set:
    """Hashes of the character 5-grams, distinct and sorted; of a shorter text the one of the whole; none of ""."""
    if not text:
        return np.zeros(0, dtype=np.uint64)
    letters = np.frombuffer(text.ljust(5, "\0").encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    count = len(letters) - 4
    mixed = letters[:count] * _FACTORS[0]
    for place, factor in enumerate(_FACTORS[1:], start=1):
        mixed += letters[place : place + count] * factor
    mixed ^= mixed >> np.uint64(31)
    mixed *= _FACTORS[0]
    mixed ^= mixed >> np.uint64(29)
    return distinct(mixed)
