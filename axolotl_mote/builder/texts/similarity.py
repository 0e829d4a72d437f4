"""Which texts are the same, nearly the same, or contained in another; the filter against evaluation prompts."""

from __future__ import annotations

import re
from typing import Any
from zlib import crc32

from axolotl_mote.chain.questions import Messages

_PERMUTATIONS = 64


def normalize(text: str) -> str:
    """Lower case, letters and digits only, one space between words: texts that agree in this count as identical."""
    return " ".join(re.findall(r"\w+", text.lower()))


class SimilarTexts:
    """Finds an earlier text that is nearly the same, in nearly constant time per text.

    MinHash finds candidates; the exact Jaccard similarity of the character 5-grams decides. Texts that differ only in
    case and punctuation always match.

    Args:
        threshold: Jaccard similarity from which two texts count as the same; None: only identical texts do.
    """

    def __init__(self, threshold: float | None) -> None:
        self._exact: dict[str, str] = {}
        self._threshold = threshold
        self._latest: tuple[str, Any] = ("", None)
        if threshold is not None:
            from datasketch import MinHash, MinHashLSH

            # The index uses a lower threshold, so that it misses hardly any match; the exact test removes the others.
            self._lsh = MinHashLSH(threshold=max(0.1, threshold - 0.3), num_perm=_PERMUTATIONS)
            self._blank = MinHash(num_perm=_PERMUTATIONS, hashfunc=crc32)
            self._texts: dict[str, str] = {}

    def find(self, text: str) -> str | None:
        """Name of an earlier text that is nearly the same, or None."""
        key = normalize(text)
        if key in self._exact or self._threshold is None or not key or not self._exact:
            return self._exact.get(key)
        grams = _grams(key)
        for name in sorted(self._lsh.query(self._sketch(key))):
            other = _grams(self._texts[name])
            if len(grams & other) / len(grams | other) >= self._threshold:
                return str(name)
        return None

    def add(self, name: str, text: str) -> None:
        """Remember a text; of several identical texts the first keeps its name."""
        key = normalize(text)
        if key in self._exact or not key:
            return
        self._exact[key] = name
        if self._threshold is not None:
            self._lsh.insert(name, self._sketch(key))
            self._texts[name] = key

    def _sketch(self, key: str) -> Any:
        """MinHash of a text; the latest one is kept, since ``add`` usually follows ``find``."""
        if self._latest[0] != key:
            sketch = self._blank.copy()  # shares the permutations, which are expensive to compute
            sketch.update_batch([gram.encode("utf-8", "surrogatepass") for gram in _grams(key)])
            self._latest = (key, sketch)
        return self._latest[1]


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


def _grams(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}
