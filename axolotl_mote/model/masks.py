"""The visibility rule of step dropout, ``is_visible``, and one form of it for each kind of attention.

The rule: a token sees an earlier token of its document unless that token belongs to another, dropped step (and, in a
sliding-window layer, unless it is too far away). The forms: a dense boolean mask, a BlockMask for flex_attention, and
segments for variable-length attention. Distances are measured in positions that follow visibility, so a window reaches
as far as in the shortened chain. Pure tensors; no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass
class Visibility:
    """What decides whether one token sees another; all tensors have shape (B, T).

    Args:
        documents: Start index of each token's document.
        step_ids: Step of each token, 0 for the question.
        dropped: True at tokens of dropped steps.
        positions: Positions that follow visibility.
        valid: False at padding.
    """

    documents: Tensor
    step_ids: Tensor
    dropped: Tensor
    positions: Tensor
    valid: Tensor


def is_visible(visibility: Visibility, window: int | None = None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as a predicate ``(b, h, q_idx, kv_idx) -> bool``.

    Args:
        visibility: The tensors that decide.
        window: A token sees at most this many tokens, itself included; None means all.
    """
    documents, step_ids, dropped = visibility.documents, visibility.step_ids, visibility.dropped
    positions, valid = visibility.positions.int(), visibility.valid

    def predicate(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        same_document = (documents[b, q] == documents[b, kv]) & valid[b, kv]
        not_dropped = ~dropped[b, kv] | (step_ids[b, kv] == step_ids[b, q])
        seen = (kv < q) & same_document & not_dropped
        if window is not None:
            seen = seen & (positions[b, q] - positions[b, kv] < window)
        return seen | (q == kv)  # every query sees itself: no row of the softmax is ever empty

    return predicate


def build_dense_mask(visibility: Visibility, window: int | None = None) -> Tensor:
    """The rule as a boolean mask for SDPA, shape (B, 1, T, T), True where attention is allowed."""
    batch, length = visibility.step_ids.shape
    device = visibility.step_ids.device
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    q = torch.arange(length, device=device).view(1, 1, -1, 1)
    kv = torch.arange(length, device=device).view(1, 1, 1, -1)
    return is_visible(visibility, window)(b, torch.zeros_like(b), q, kv)


def build_block_mask(visibility: Visibility, window: int | None = None) -> BlockMask:
    """The rule as a BlockMask for flex_attention, one for all heads; T need not be a multiple of the block."""
    batch, length = visibility.step_ids.shape
    device = visibility.step_ids.device
    # Compiled, it never holds the T x T pairs, as in transformers. Eager on the CPU, where only tests use it.
    create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return create(is_visible(visibility, window), batch, None, length, length, device=str(device))


@dataclass
class Segments:
    """The rule as sequences for variable-length attention: gathered queries, gathered keys, one causal mask each.

    The kept tokens of a document are one ordinary causal sequence. Only a dropped step needs its keys gathered a second
    time: what came before it, then itself. Keys are at least as long as queries and the causal mask is aligned to the
    last of both, so every query sees exactly what the rule allows.

    Args:
        queries: Order in which the B * T tokens are grouped into sequences, shape (B * T,).
        inverse: Puts the attention's output back into place, shape (B * T,).
        keys: Tokens that each sequence's keys are gathered from, shape (K,), K >= B * T.
        query_starts: Offsets of the sequences among the queries, shape (N + 1,), int32.
        key_starts: Offsets of the sequences among the keys, shape (N + 1,), int32.
        max_queries: Length of the longest sequence of queries.
        max_keys: Length of the longest sequence of keys.
    """

    queries: Tensor
    inverse: Tensor
    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int


def build_segments(visibility: Visibility) -> Segments:
    """The rule as segments.

    The lengths of the sequences depend on the data, so this copies the tensors to the CPU: one synchronization per
    forward of the whole model, outside the layers. Padding forms sequences of its own, whose outputs mean nothing.
    """
    step_ids, device = visibility.step_ids, visibility.step_ids.device
    stacked = torch.stack([visibility.documents, step_ids, visibility.dropped.long(), visibility.valid.long()]).cpu()
    documents, steps, dropped, valid = stacked
    length = step_ids.shape[1]
    token = torch.arange(step_ids.numel())
    document = (torch.arange(step_ids.shape[0]).unsqueeze(1) * length + documents).flatten()
    # Sequence of every token: kept (0), one per dropped step (its id), padding (-1).
    group = torch.where(valid.flatten() == 0, -1, torch.where(dropped.flatten() == 1, steps.flatten(), 0))
    num_groups = int(steps.max()) + 2
    sequence = document * num_groups + group + 1
    queries = torch.argsort(sequence, stable=True)
    _, counts = torch.unique_consecutive(sequence[queries], return_counts=True)
    keys: list[Tensor] = []
    kept_by_document: dict[int, Tensor] = {}
    for members in torch.split(queries, counts.tolist()):
        first = int(members[0])
        if int(group[first]) == 0:
            kept_by_document[int(document[first])] = members  # sorts before the document's dropped steps
        if int(group[first]) > 0:
            kept = kept_by_document.get(int(document[first]), token[:0])
            members = torch.cat([kept[kept < first], members])
        keys.append(members)
    key_counts = torch.tensor([len(members) for members in keys])

    def starts(lengths: Tensor) -> Tensor:
        return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)

    return Segments(
        queries=queries.to(device),
        inverse=torch.argsort(queries).to(device),
        keys=torch.cat(keys).to(device),
        query_starts=starts(counts),
        key_starts=starts(key_counts),
        max_queries=int(counts.max()),
        max_keys=int(key_counts.max()),
    )
