"""Finds sets whose Jaccard similarity reaches a threshold t, without comparing each set with every other.

Two exact bounds leave few sets to compare:

- **Prefix.** Sort every set's elements from rare to frequent. Two similar sets of n and m elements share at least
  a = t / (1 + t) * (n + m) of them, so their first common one is among the first n - a + 1 of the one and m - a + 1 of
  the other. What all sets share (a template's text) is sorted last, and is hardly ever looked up.
- **Parity bitmap.** Each element flips one bit; two sets differ in at least as many elements as their bitmaps in bits.

Which elements are rare is estimated from the sets seen so far; it decides how fast a search is, not what it finds.

A search goes through ``MOST_READ`` numbers, or those of the eight rarest elements. Only where sets are made of few
different elements, such as texts of 300 words, does this cut the prefix: a similar set is then missed if it lacks
nearly all of the rarest elements, of which it has 8 in 9 on average at a threshold of 0.8.
No text is known here: sets are sorted arrays of distinct uint64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Set = NDArray[np.uint64]
Ints = NDArray[np.int64]

_Number = TypeVar("_Number", np.uint64, np.int64)

MOST_READ = 100_000
"""Numbers that one search goes through at most, unless those of ``_FEWEST`` elements are more; about a millisecond."""

_FEWEST = 8
"""Elements that a search looks up at least."""

_SLACK = 1e-6  # bounds are rounded to the safe side
_COUNT_BITS = 20
_MOST_SLOT_BITS = 24
_REBUILD_FACTOR = 8
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_NEXT_BUCKET = np.uint64(0xD1B54A32D192ED03)


def jaccard(a: Set, b: Set) -> float:
    """Size of the intersection over that of the union; 1 for two empty sets."""
    both = np.concatenate([a, b])
    both.sort()
    shared = np.count_nonzero(both[1:] == both[:-1])
    return shared / (len(both) - shared) if len(both) else 1.0


def distinct(elements: NDArray[_Number]) -> NDArray[_Number]:
    """Each of the elements once, sorted; the input is sorted in place (faster than np.unique)."""
    elements.sort()
    first = np.ones(len(elements), dtype=bool)
    np.not_equal(elements[1:], elements[:-1], out=first[1:])
    once: NDArray[_Number] = elements[first]
    return once


class SetIndex:
    """Sets by number, and the search for those that may be similar to another.

    Args:
        threshold: Jaccard similarity t, above 0 to 1.
        load: Gives a set back by its number; they are not kept here.
    """

    def __init__(self, threshold: float, load: Callable[[int], Set]) -> None:
        self._threshold, self._load = threshold, load
        self._bucket_width = max(math.log(1 / threshold) / 4, 0.02)  # of log(size)
        self._counts = np.zeros(1 << _COUNT_BITS, dtype=np.int64)
        self._postings = _Postings(12)
        self._sizes = np.zeros(64, dtype=np.int64)
        self._bitmaps: dict[int, _Rows] = {}  # by their number of 64-bit words
        self._rows = np.zeros(64, dtype=np.int64)  # where each set's bitmap stands there
        self._extra = np.zeros(64, dtype=np.uint8)  # how many elements more its prefix holds
        self._next_rebuild = 64
        self.count = 0

    def add(self, elements: Set) -> None:
        """Add a set; its number is how many were added before."""
        number, size = self.count, len(elements)
        if number == len(self._sizes):
            self._sizes, self._rows = (np.resize(column, 2 * number) for column in (self._sizes, self._rows))
            self._extra = np.resize(self._extra, 2 * number)
        self._sizes[number], self._extra[number] = size, self._more(size)
        self.count += 1
        if size:
            words = int(_bitmap_words(size))
            self._rows[number] = self._bitmaps.setdefault(words, _Rows(words)).append(_bitmap(elements, words))
            self._post(number, elements)
        if self.count == self._next_rebuild:
            self._rebuild()

    def lookup(self, elements: Set) -> tuple[int, Callable[[], Ints]]:
        """How many numbers a search would go through, and the search.

        Args:
            elements: The set that others may be similar to; not empty.

        Returns:
            A count, and a function that returns the numbers of all sets that may be similar, ascending.
        """
        more = self._more(len(elements))
        ordered = self._ordered(elements)
        few, many = self._spans(ordered, 0), self._spans(ordered, more)
        # Longer prefixes find far fewer sets that have little in common, unless they reach into what all sets share.
        if int(many[1].sum()) > 10 * int(few[1].sum()) + 100:
            many, more = few, 0
        starts, lengths, ranks = many
        fits = int(np.searchsorted(lengths.cumsum(), MOST_READ, side="right"))
        if fits < len(lengths):
            # Whole elements alone. Of a part of the prefix, a similar set has as large a share.
            looked_up = max(int(ranks[fits]), _FEWEST)
            more = more * looked_up // len(self._prefix(ordered, more))
            starts, lengths = starts[ranks < looked_up], lengths[ranks < looked_up]
        return int(lengths.sum()), lambda: self._shared_by((starts, lengths), more)

    def _spans(self, ordered: Set, more: int) -> tuple[Ints, Ints, Ints]:
        """Where the postings are that a prefix longer by so many elements leads to, their lengths, and whose they are.

        The last are places in the prefix, ascending.
        """
        t, size = self._threshold, len(ordered)
        prefix = self._prefix(ordered, more)
        rest = size - np.arange(len(prefix)) + more  # elements from this one on
        largest = np.minimum(size / t, rest * (1 + t) / t - size) + _SLACK
        lowest = self._bucket(np.array([max(t * size - _SLACK, 1)]))
        buckets = np.maximum(self._bucket(np.maximum(largest, 1)) - lowest + 1, 0)
        slots = self._slots(np.repeat(prefix, buckets), _ranges(np.repeat(lowest, len(prefix)), buckets))
        starts, lengths = self._postings.spans(slots)
        filled = lengths > 0
        return starts[filled], lengths[filled], np.repeat(np.arange(len(prefix)), buckets)[filled]

    def _shared_by(self, spans: tuple[Ints, Ints], more: int) -> Ints:
        """The numbers that occur in the postings at least once, and once more for each element more on both sides."""
        hits = self._postings.read(*spans)
        if len(hits) > self.count // 4:  # to count takes linear time, but in the number of sets as well
            times = np.bincount(hits, minlength=self.count)
            return np.flatnonzero(times > np.minimum(self._extra[: self.count], more))
        hits.sort()
        first = np.flatnonzero(np.r_[True, hits[1:] != hits[:-1]][: len(hits)])
        numbers = hits[first].astype(np.int64)
        enough: Ints = numbers[np.diff(np.r_[first, len(hits)]) > np.minimum(self._extra[numbers], more)]
        return enough

    def possible(self, elements: Set, numbers: Ints) -> Ints:
        """Those of the numbers whose sets can still be similar, judged by size and bitmap."""
        t, size = self._threshold, len(elements)
        sizes = self._sizes[numbers]
        fits = (sizes >= t * size - _SLACK) & (sizes * t <= size + _SLACK)
        numbers, sizes = numbers[fits], sizes[fits]
        if not size or not len(numbers):
            return numbers
        most = (1 - t) / (1 + t) * (sizes + size) + _SLACK  # elements in which similar sets may differ
        possible = np.zeros(len(numbers), dtype=bool)
        widths = _bitmap_words(sizes)
        for words in np.unique(widths).tolist():
            here = np.flatnonzero(widths == words)
            bitmap, table = _bitmap(elements, words), self._bitmaps[words].table
            for part in (slice(0, words // 4), slice(None)):  # a quarter is enough for sets that have little in common
                different = np.bitwise_count(table[self._rows[numbers[here]], part] ^ bitmap[part])
                here = here[different.sum(axis=1) <= most[here]]
            possible[here] = True
        left: Ints = numbers[possible]
        return left

    def _ordered(self, elements: Set) -> Set:
        """From rare to frequent; of equally frequent ones the order is that of their values."""
        return elements[np.argsort(self._counts[elements >> np.uint64(64 - _COUNT_BITS)], kind="stable")]

    def _prefix(self, ordered: Set, more: int) -> Set:
        """The rarest elements: at least the first 1 + more of those shared with a similar set are among them."""
        return ordered[: len(ordered) - math.ceil(self._threshold * len(ordered) - _SLACK) + 1 + more]

    def _more(self, size: int) -> int:
        """How many elements a longer prefix holds more; fewer than must be shared."""
        return min(int(size * min(0.05, self._threshold / 2)), 16)

    def _bucket(self, sizes: NDArray[np.float64] | Ints) -> Ints:
        buckets: Ints = np.floor(np.log(sizes) / self._bucket_width).astype(np.int64)
        return buckets

    def _slots(self, elements: Set, buckets: Ints) -> Ints:
        mixed = (elements + buckets.astype(np.uint64) * _NEXT_BUCKET) * _SPREAD
        return (mixed >> np.uint64(64 - self._postings.bits)).astype(np.int64)

    def _post(self, number: int, elements: Set) -> None:
        prefix = self._prefix(self._ordered(elements), self._more(len(elements)))
        buckets = self._bucket(np.full(len(prefix), len(elements)))
        self._postings.append(self._slots(prefix, buckets), number)

    def _rebuild(self) -> None:
        """Count the elements anew and sort the sets by these counts; the later ones will be, too."""
        self._counts[:] = 0
        for number in range(self.count):
            self._counts[np.unique(self._load(number) >> np.uint64(64 - _COUNT_BITS))] += 1
        expected = _REBUILD_FACTOR * self._postings.used
        self._postings = _Postings(min(max(12, expected.bit_length()), _MOST_SLOT_BITS))
        for number in range(self.count):
            elements = self._load(number)
            if len(elements):
                self._post(number, elements)
        self._next_rebuild *= _REBUILD_FACTOR


class _Postings:
    """A growing list of numbers per slot, all in one pool; a full list moves to twice the space at the pool's end."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.used = 0
        self._pool = np.zeros(1 << bits, dtype=np.int32)
        self._start = np.zeros(1 << bits, dtype=np.int64)
        self._length = np.zeros(1 << bits, dtype=np.int32)

    def append(self, slots: Ints, number: int) -> None:
        """Append a number to the lists of the slots."""
        slots = distinct(slots)
        lengths = self._length[slots].astype(np.int64)
        full = (lengths & (lengths - 1)) == 0  # 0, 1, 2, 4, ... fill their space
        grown, held = slots[full], lengths[full]
        space = np.maximum(2 * held, 1)
        start = self.used + np.cumsum(space) - space
        self.used += int(space.sum())
        if self.used > len(self._pool):
            self._pool = np.concatenate([self._pool, np.zeros(self.used, dtype=np.int32)])
        self._pool[_ranges(start, held)] = self._pool[_ranges(self._start[grown], held)]
        self._start[grown] = start
        self._pool[self._start[slots] + lengths] = number
        self._length[slots] = lengths + 1

    def spans(self, slots: Ints) -> tuple[Ints, Ints]:
        """Where the lists of the slots begin in the pool, and their lengths."""
        return self._start[slots], self._length[slots].astype(np.int64)

    def read(self, starts: Ints, lengths: Ints) -> NDArray[np.int32]:
        """The numbers in those parts of the pool."""
        if lengths.sum() > 100 * len(lengths):  # to copy a long part whole is faster
            ends = starts + lengths
            return np.concatenate([self._pool[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
        return self._pool[_ranges(starts, lengths)]


class _Rows:
    """A growing table."""

    def __init__(self, width: int) -> None:
        self.table = np.zeros((16, width), dtype=np.uint64)
        self._count = 0

    def append(self, row: Set) -> int:
        """Append a row and return its place."""
        if self._count == len(self.table):
            self.table = np.concatenate([self.table, np.zeros_like(self.table)])
        self.table[self._count] = row
        self._count += 1
        return self._count - 1


def _bitmap_words(sizes: int | Ints) -> Ints:
    """Number of 64-bit words of a bitmap: a power of two, 8 to 16 bits per element, at least 8 words."""
    words: Ints = 1 << np.maximum(3, np.ceil(np.log2(np.asarray(sizes) / 8))).astype(np.int64)
    return words


def _bitmap(elements: Set, words: int) -> Set:
    bits = np.bincount((elements & np.uint64(64 * words - 1)).astype(np.int64), minlength=64 * words) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").view(np.uint64)


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """Counts up from each start: starts [5, 20] with lengths [2, 3] give 5, 6, 20, 21, 22."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
