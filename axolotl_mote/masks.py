"""The visibility rule and its renderings.

One rule: a token sees an earlier token of its document unless that token's step is hidden from it (and, in a
sliding-window layer, unless it is too far away). Three renderings for three kinds of attention: a flex BlockMask, a
dense boolean mask, and segments for variable-length attention. Distances are measured in positions that follow
visibility, so the window equals that of the shortened chain. Pure tensors; nothing here knows of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass
class Visibility:
    """What decides whether one token sees another; all tensors have shape (B, T).

    Args:
        documents: Start index of each token's document.
        step_ids: Step of each token, 0 for the question.
        hidden: True at tokens of hidden steps.
        positions: Positions that follow visibility.
        valid: False at padding.
    """

    documents: Tensor
    step_ids: Tensor
    hidden: Tensor
    positions: Tensor
    valid: Tensor


def visible(visibility: Visibility, window: int | None = None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as a predicate ``(b, h, q_idx, kv_idx) -> bool``.

    Args:
        visibility: The tensors that decide.
        window: A token sees at most this many tokens, itself included; None means all.
    """
    documents, step_ids, hidden = visibility.documents, visibility.step_ids, visibility.hidden
    positions, valid = visibility.positions, visibility.valid

    def predicate(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        same_document = (documents[b, q] == documents[b, kv]) & valid[b, kv]
        not_hidden = ~hidden[b, kv] | (step_ids[b, kv] == step_ids[b, q])
        seen = (kv < q) & same_document & not_hidden
        if window is not None:
            seen = seen & (positions[b, q] - positions[b, kv] < window)
        return seen | (q == kv)  # every query sees itself: no row of the softmax is ever empty

    return predicate


def dense_mask(visibility: Visibility, window: int | None = None) -> Tensor:
    """Render the rule as a boolean mask for SDPA, shape (B, 1, T, T), True where attention is allowed."""
    batch, length = visibility.step_ids.shape
    device = visibility.step_ids.device
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    q = torch.arange(length, device=device).view(1, 1, -1, 1)
    kv = torch.arange(length, device=device).view(1, 1, 1, -1)
    return visible(visibility, window)(b, torch.zeros_like(b), q, kv)


def flex_mask(visibility: Visibility, window: int | None = None) -> BlockMask:
    """Render the rule as a BlockMask for flex_attention, one for all heads; T need not be a multiple of the block."""
    batch, length = visibility.step_ids.shape
    device = visibility.step_ids.device
    return create_block_mask(visible(visibility, window), batch, None, length, length, device=str(device))
