"""The tokens of the training-step benchmark: real chains, or random ones of the same make, as batches for training.

A step of the benchmark is a list of micro-batches. Nothing here knows a model.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_mote.chain.steps import IGNORE_INDEX
from axolotl_mote.model.loss import scored_positions, shift

STEPS = ["analysis", "guidance", "response"]
SHARES = (0.23, 0.17, 0.10, 0.50)  # question and steps by tokens, measured on the full seed chains
EXPANDED = ((1,), (1, 2), (2,), (2, 3), (3,), (1, 3), (1, 2, 3))
"""The steps that follow the question in the paper's data sets: (x, x_a), (x, x_a, x_g), ..., (x, x_a, x_g, A)."""
PAD_TO = 64  # axolotl pads batches to a multiple of this

Document = dict[int, Tensor]
"""Tokens by step id: 0 the question, then the present steps with their markers; end of turn belongs to the last."""
Row = tuple[Tensor, Tensor]
"""Tokens and labels."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch; position_ids are None unless it is packed, attention_mask is None unless it is padded."""

    input_ids: Tensor
    labels: Tensor
    targets: Tensor
    scored: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    def to(self, device: str) -> Batch:
        """The same on a device."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: None if value is None else value.to(device) for name, value in tensors.items()})

    def below(self, vocab_size: int) -> Batch:
        """The same for a model whose table ends before the markers: its last row stands for them."""
        return dataclasses.replace(
            self,
            **{name: getattr(self, name).clamp(max=vocab_size - 1) for name in ("input_ids", "labels", "targets")},
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """What a compiled layer is compiled for: rows, columns, and whether there is a mask."""
        return (*self.input_ids.shape, int(self.attention_mask is not None))


def real_documents(model: Path, chains: Path) -> tuple[list[Document], list[int]]:
    """The chains of a file in the order of a seeded shuffle, as training encodes them, and the ids of the markers.

    Args:
        model: Folder of the tokenizer; the markers are added to it, beyond the model's table.
        chains: A file of chain rows.
    """
    from transformers import AutoTokenizer

    from axolotl_mote.chain.codec import ChainCodec
    from axolotl_mote.chain.steps import markers

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": markers(STEPS)}, replace_extra_special_tokens=False)
    codec = ChainCodec(tokenizer, STEPS)
    rows = [json.loads(line) for line in chains.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    marker_ids = list(codec.vocabulary.marker_ids)
    return [split_steps(codec.encode_chain(row)["input_ids"], marker_ids) for row in rows], marker_ids


def split_steps(ids: Sequence[int], marker_ids: Sequence[int]) -> Document:
    """Cut a chain before every start marker.

    Example: ids [5, 90, 6, 91, 94, 7, 95, 2] and markers 90 to 95 give {0: [5], 1: [90, 6, 91], 3: [94, 7, 95, 2]}.
    """
    starts = list(marker_ids[0::2])
    cuts = [position for position, token in enumerate(ids) if token in starts]
    parts = torch.tensor(ids).tensor_split(cuts)
    return {0: parts[0]} | {starts.index(int(part[0])) + 1: part for part in parts[1:]}


def random_documents(lengths: list[int], vocab: int, marker_ids: list[int]) -> list[Document]:
    """Random full chains of these lengths."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in lengths:
        sizes = [max(3, round(share * length)) for share in SHARES[:-1]]
        parts = torch.randint(3, vocab - 6, (length,), generator=generator).split([*sizes, length - sum(sizes)])
        for part, start, end in zip(parts[1:], marker_ids[0::2], marker_ids[1::2], strict=True):
            part[0], part[-1] = start, end
        documents.append(dict(enumerate(parts)))
    return documents


def document_lengths(tokens: int, count: int) -> list[int]:
    """Uneven lengths that add up: half of the tokens evenly, half at random."""
    cuts = torch.rand(count, generator=torch.Generator().manual_seed(1))
    lengths = (tokens / count / 2 + cuts / cuts.sum() * tokens / 2).long()
    lengths[-1] += tokens - lengths.sum()
    return cast("list[int]", lengths.tolist())


def row_of(document: Document, steps: Sequence[int]) -> Row:
    """Tokens and labels of the chain that holds only these steps."""
    ids = torch.cat([document[0], *(document[step] for step in steps)])
    labels = ids.clone()
    labels[: len(document[0])] = IGNORE_INDEX
    return ids, labels


def full_rows(documents: list[Document]) -> list[Row]:
    """Every document as it is."""
    return [row_of(document, sorted(document)[1:]) for document in documents]


def expanded_rows(documents: list[Document]) -> list[Row]:
    """The rows that the paper's data sets hold instead, one pattern of steps after the other."""
    return [row_of(document, steps) for steps in EXPANDED for document in documents if {*steps} <= document.keys()]


def _batch(ids: Tensor, labels: Tensor, mask: Tensor | None, positions: Tensor | None) -> Batch:
    return Batch(ids, labels, shift(labels, IGNORE_INDEX), scored_positions(labels), mask, positions)


def padded(rows: list[Row], multiple: int = PAD_TO) -> Batch:
    """Rows beside each other, padded on the right to a multiple, as axolotl's collator does it."""
    length = -(-max(len(ids) for ids, _ in rows) // multiple) * multiple

    def stack(tensors: list[Tensor], fill: int) -> Tensor:
        return torch.stack([F.pad(one, (0, length - len(one)), value=fill) for one in tensors])

    mask = stack([torch.ones_like(ids) for ids, _ in rows], 0)
    ids, labels = stack([ids for ids, _ in rows], 0), stack([labels for _, labels in rows], IGNORE_INDEX)
    return _batch(ids, labels, None if bool(mask.all()) else mask, None)


def packed(rows: list[Row]) -> Batch:
    """Rows behind each other, told apart by their positions; never padded."""
    ids, labels = (torch.cat(parts).unsqueeze(0) for parts in zip(*rows, strict=True))
    return _batch(ids, labels, None, torch.cat([torch.arange(len(one)) for one, _ in rows]).unsqueeze(0))


def packed_up_to(rows: list[Row], limit: int) -> list[Batch]:
    """Rows packed as they come into sequences of at most ``limit`` tokens."""
    groups: list[list[Row]] = []
    used = limit
    for row in rows:
        if used + len(row[0]) > limit:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += len(row[0])
    return [packed(group) for group in groups]


def in_groups(rows: list[Row], size: int) -> list[list[Row]]:
    """Consecutive rows, ``size`` at a time."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
