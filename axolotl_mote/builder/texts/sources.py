"""Rows of question sources: files, and Hugging Face data sets."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from heapq import nsmallest
from itertools import islice
from pathlib import Path

from axolotl_mote.benchmarks.tables import Row, read_file
from axolotl_mote.builder.settings import QuestionSource


def read_rows(source: QuestionSource, seed: int = 0) -> Iterable[Row]:
    """The rows of a source, in order.

    Args:
        source: ``limit`` takes rows from the top; ``sample`` draws from those.
        seed: Seed of the draw.

    Raises:
        ValueError: If the file is missing or holds something other than rows; all such lines of a JSONL file at once.
    """
    rows = read_file(Path(source.path), "questions.path")
    rows = islice(_read_dataset(source) if rows is None else rows, source.limit)
    if source.sample is None:
        return rows
    draw = random.Random(seed)  # one number per row, whatever the size of the sample
    return sorted(nsmallest(source.sample, rows, key=lambda _: draw.random()), key=lambda row: row[0])


def _read_dataset(source: QuestionSource) -> Iterator[Row]:
    from datasets import load_dataset

    where = {"data_dir": source.data_dir, "split": source.split, "revision": source.revision}
    yield from enumerate(map(dict, load_dataset(source.path, source.name, **where)), start=1)
