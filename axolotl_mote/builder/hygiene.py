"""Faults of generated text, control tokens in foreign text, and near-duplicates.

Pure text in, text or verdict out; it knows nothing about models or files.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any
from zlib import crc32

from axolotl_mote.builder.calls import Completion
from axolotl_mote.builder.settings import Hygiene

# What chat templates mark turns with: <|im_end|>, <|/analysis|>, <｜User｜>, <s>, <end_of_turn>, [INST], <<SYS>>
_CONTROL = re.compile(
    r"<[|｜][^<>\n]{1,40}[|｜]>"
    r"|</?(?:s|bos|eos|pad|unk|mask|end_of_turn|start_of_turn|end_of_text|endoftext)>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>",
    re.IGNORECASE,
)
_EDGES = re.compile(rf"\A(?:\s|{_CONTROL.pattern})+|(?:\s|{_CONTROL.pattern})+\Z", re.IGNORECASE)
_THINKING = re.compile(r"\A(?:.*</think>)?(?:\s*<think>.*)?", re.DOTALL)

_PERMUTATIONS = 64
_CANNOT = r"(?:can'?t|cannot|can not|won'?t|am unable|am not able)\b"
_REFUSALS = (
    rf"(?:i'?m|i am) (?:very |really |so |truly )?sorry,?(?: but)?(?: as an? [\w ]+,)? i {_CANNOT}",
    rf"(?:sorry|apologies|i apologi[sz]e)[,.]? (?:but )?i {_CANNOT}",
    rf"i {_CANNOT}(?: to)? (?:assist|help|comply|fulfil|provide|answer|do that|support)",
    rf"as an? (?:ai|artificial intelligence|language model|large language model)[\w ]*, i (?:{_CANNOT}|don'?t\b)",
)


def neutralise(text: str) -> tuple[str, int]:
    """Break up control tokens so that no tokenizer reads them as such: ``<|im_end|>`` becomes ``< |im_end|>``.

    Returns:
        The text and how many were broken up.
    """
    return _CONTROL.subn(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs, which JSON can spell, become "?"."""
    return text.encode("utf-8", "replace").decode()


def without_thinking(text: str) -> str:
    """Generated text without the reasoning before it.

    A template may have opened ``<think>`` in the prompt, so everything up to the last ``</think>`` is reasoning; and
    everything, if an opened one is never closed.
    """
    return _THINKING.sub("", text, count=1)


def clean(text: str) -> tuple[str, int]:
    """Generated text as it may be stored: UTF-8, no reasoning before it, no control tokens at the ends, none inside.

    Returns:
        The text and how many control tokens were broken up inside it.
    """
    return neutralise(_EDGES.sub("", without_thinking(encodable(text))).strip())


def defect(completion: Completion, text: str, rules: Hygiene) -> str | None:
    """Why a text cannot be used, or None.

    Args:
        completion: What the model gave back.
        text: Its cleaned text.
        rules: Thresholds.

    Returns:
        filtered, refused_by_server, empty, truncated, repeated, refusal, or None.
    """
    if completion.finish in ("filtered", "refused"):
        return "filtered" if completion.finish == "filtered" else "refused_by_server"
    words = text.split()
    if len(words) < rules.min_words or not any(map(str.isalnum, text)):
        return "empty"
    if is_repeated(text, rules):
        return "repeated"
    if completion.finish == "length":
        return "truncated"
    if len(words) <= rules.refusal_max_words and is_refusal(text, rules):
        return "refusal"
    return None


def is_repeated(text: str, rules: Hygiene) -> bool:
    """True if a line comes back too often or too few of the word 4-grams are distinct."""
    lines = Counter(line.strip() for line in text.splitlines() if line.strip())
    if lines and max(lines.values()) > rules.max_line_repeats:
        return True
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    # Fewer than 20 grams say little: a short list may repeat its pattern on purpose.
    return len(grams) >= 20 and len(set(grams)) / len(grams) < rules.min_distinct_ngrams


def is_refusal(text: str, rules: Hygiene) -> bool:
    """True if the text opens with a stock refusal."""
    opening = text.replace("’", "'").lstrip("\"'*# \n").lower()
    patterns = (*_REFUSALS, *rules.refusal_patterns)
    return any(re.match(pattern, opening, re.IGNORECASE) for pattern in patterns)


def normalise(text: str) -> str:
    """Lower case, letters and digits only, one space between words: what counts as the same text."""
    return " ".join(re.findall(r"\w+", text.lower()))


class SimilarTexts:
    """Finds an earlier text that is nearly the same, in close to constant time per text.

    MinHash finds candidates, the exact Jaccard similarity of the character 5-grams decides. Texts that differ only in
    case and punctuation always match.

    Args:
        threshold: Jaccard similarity from which two texts count as the same; None: only identical ones do.
    """

    def __init__(self, threshold: float | None) -> None:
        self._exact: dict[str, str] = {}
        self._threshold = threshold
        self._latest: tuple[str, Any] = ("", None)
        if threshold is not None:
            from datasketch import MinHash, MinHashLSH

            # A lower threshold than asked for, so that hardly any true match is missed; the exact test sorts them out.
            self._lsh = MinHashLSH(threshold=max(0.1, threshold - 0.3), num_perm=_PERMUTATIONS)
            self._blank = MinHash(num_perm=_PERMUTATIONS, hashfunc=crc32)
            self._texts: dict[str, str] = {}

    def find(self, text: str) -> str | None:
        """Name of an earlier text that is nearly the same, or None."""
        key = normalise(text)
        if key in self._exact or self._threshold is None or not key or not self._exact:
            return self._exact.get(key)
        grams = _grams(key)
        for name in sorted(self._lsh.query(self._sketch(key))):
            other = _grams(self._texts[name])
            if len(grams & other) / len(grams | other) >= self._threshold:
                return str(name)
        return None

    def add(self, name: str, text: str) -> None:
        """Remember a text; the first of several identical ones keeps its name."""
        key = normalise(text)
        if key in self._exact or not key:
            return
        self._exact[key] = name
        if self._threshold is not None:
            self._lsh.insert(name, self._sketch(key))
            self._texts[name] = key

    def _sketch(self, key: str) -> Any:
        """MinHash of a text; the latest is kept, since ``add`` usually follows ``find``."""
        if self._latest[0] != key:
            sketch = self._blank.copy()  # shares its permutations, which are dear to make
            sketch.update_batch([gram.encode("utf-8", "surrogatepass") for gram in _grams(key)])
            self._latest = (key, sketch)
        return self._latest[1]


class ContainedTexts:
    """Finds remembered texts word for word inside others, in time that hardly depends on how many are remembered.

    Texts of fewer than three words are not remembered: "Yes." may well stand in any other text.
    """

    def __init__(self) -> None:
        self._texts: set[tuple[str, ...]] = set()
        self._lengths: dict[tuple[str, ...], set[int]] = {}  # of the texts that begin with these three words

    def add(self, text: str) -> None:
        """Remember a text."""
        words = tuple(normalise(text).split())
        if len(words) >= 3:
            self._texts.add(words)
            self._lengths.setdefault(words[:3], set()).add(len(words))

    def inside(self, text: str) -> bool:
        """True if a remembered text stands in this one; case and punctuation do not count."""
        words = tuple(normalise(text).split())
        return any(
            words[i : i + length] in self._texts
            for i in range(len(words) - 2)
            for length in self._lengths.get(words[i : i + 3], ())
        )


def _grams(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}
