"""Self-BLEU: how similar the texts of a set are; 100 means that every text can be composed of parts of the others.

The definition is nltk's: ``sentence_bleu`` of each text against all others, 4-grams, smoothing method 1, times 100. The
value is exact and computed for the whole set at once: references matter only through the largest count of each n-gram,
so the two largest counts over all texts are enough. The cost grows with the number of words, not with its square.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# A word, one CJK or kana character (those scripts write no spaces), or a punctuation mark.
_TOKEN = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿]|[^\W぀-ヿ㐀-䶿一-鿿豈-﫿]+|[^\w\s]")
_ORDER = 4
_EPSILON = 0.1  # nltk's SmoothingFunction(epsilon=0.1).method1: the matches counted where there are none

Ints = NDArray[np.int64]


def tokenize(text: str) -> list[str]:
    """Words and punctuation marks, case unchanged."""
    return _TOKEN.findall(text)


def self_bleu(texts: Sequence[Sequence[str]]) -> float | None:
    """Mean BLEU of each text against all others, times 100.

    Args:
        texts: N tokenized texts.

    Returns:
        0 to 100, lower is more diverse; None for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    vocabulary: dict[str, int] = {}
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    ids = (vocabulary.setdefault(word, len(vocabulary)) for text in texts for word in text)
    stream = np.fromiter(ids, dtype=np.int64, count=int(lengths.sum()))
    owner = np.repeat(np.arange(len(texts)), lengths)
    log_precision = np.zeros(len(texts))
    unmatched = np.zeros(len(texts), dtype=bool)
    grams = stream
    for order in range(1, _ORDER + 1):
        if order > 1:
            grams = _extend(grams, stream, order)
        inside = owner[: len(grams)] == owner[order - 1 : order - 1 + len(grams)]
        matched = _clipped_matches(grams[inside], owner[: len(grams)][inside], len(texts))
        total = np.maximum(lengths - order + 1, 1)
        unmatched |= (matched == 0) if order == 1 else False
        log_precision += np.log(np.where(matched == 0, _EPSILON, matched) / total) / _ORDER
    bleu = np.exp(log_precision + _brevity(lengths))
    bleu[unmatched | (lengths == 0)] = 0.0
    return float(100 * bleu.mean())


def _extend(grams: Ints, stream: Ints, order: int) -> Ints:
    """Ids of the n-grams at each position, from the ids of the (n-1)-grams and the word that follows."""
    following = stream[order - 1 :]
    pairs = grams[: len(following)] * (int(stream.max(initial=0)) + 1) + following
    ids: Ints = np.unique(pairs, return_inverse=True)[1].astype(np.int64)
    return ids


def _clipped_matches(grams: Ints, owner: Ints, texts: int) -> Ints:
    """For each text, how many of its n-grams also occur in one other text, at most as often as there.

    Args:
        grams: Id of the n-gram at each position, shape (P,).
        owner: Text at each position, shape (P,).
        texts: Number of texts N.

    Returns:
        Matches, shape (N,).
    """
    if not len(grams):
        return np.zeros(texts, dtype=np.int64)
    pairs, counts = np.unique(grams * texts + owner, return_counts=True)
    gram, text = pairs // texts, pairs % texts
    order = np.lexsort((-counts, gram))
    gram, text, counts = gram[order], text[order], counts[order]
    first = np.flatnonzero(np.r_[True, gram[1:] != gram[:-1]])
    sizes = np.diff(np.r_[first, len(gram)])
    runner_up = np.where(sizes > 1, counts[np.minimum(first + 1, len(counts) - 1)], 0)
    best_of_others = np.repeat(counts[first], sizes)
    best_of_others[first] = runner_up
    matches: Ints = np.bincount(text, np.minimum(counts, best_of_others), texts).astype(np.int64)
    return matches


def _brevity(lengths: Ints) -> NDArray[np.float64]:
    """Log of the brevity penalty against the other text of closest length; the shorter one if two are equally close."""
    ordered = np.sort(lengths)
    rank = np.searchsorted(ordered, lengths)
    # Without the text itself, its neighbors in the sorted list are the candidates.
    same = np.searchsorted(ordered, lengths, side="right") - rank > 1
    below = np.where(rank > 0, ordered[rank - 1], -(1 << 40))
    above_rank = np.searchsorted(ordered, lengths, side="right")
    above = np.where(above_rank < len(ordered), ordered[np.minimum(above_rank, len(ordered) - 1)], 1 << 40)
    closest = np.where(lengths - below <= above - lengths, below, above)
    closest = np.where(same, lengths, closest)
    return np.where(lengths > closest, 0.0, 1 - closest / np.maximum(lengths, 1))
