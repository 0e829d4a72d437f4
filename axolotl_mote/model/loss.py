"""The loss: cross-entropy weighted by step, and what every token predicts.

Pure tensors in, pure tensors out. The logits of a whole batch are never held: the head runs on chunks of tokens, and
each chunk is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from axolotl_mote.chain.steps import IGNORE_INDEX

_CHUNK_ELEMENTS = 2**27  # logits per chunk: half a GiB in float32, 1,024 tokens of a 128k vocabulary


def shift(tokens: Tensor, fill: int) -> Tensor:
    """Move the targets under the tokens that predict them: column t gets column t + 1, the last one ``fill``."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], fill)], dim=1)


def scored_positions(labels: Tensor, multiple: int = 64) -> Tensor:
    """Tokens whose next token has a label: the head and the loss need to run on no others.

    Computed where the labels are, on the CPU, the number of tokens N costs no synchronization with a device.

    Args:
        labels: Labels, shape (B, T); -100 is ignored.
        multiple: N is a multiple of this, so that few different shapes occur.

    Returns:
        Positions among the B * T tokens, shape (N,), int64, ascending, filled up with the very last token, which
        predicts nothing. Example: labels [[-100, 7], [-100, 8]] and multiple 1 give [0, 2].
    """
    scored = (shift(labels, IGNORE_INDEX) != IGNORE_INDEX).flatten().nonzero().flatten()
    missing = -len(scored) % multiple if len(scored) else multiple
    return F.pad(scored, (0, missing), value=labels.numel() - 1)


def token_weights(targets: Tensor, target_steps: Tensor, step_weights: Sequence[float]) -> Tensor:
    """Weight of every predicted token: that of its step, 0 where the target is ignored.

    Args:
        targets: Shifted labels, shape (B, T); -100 is ignored.
        target_steps: Shifted step ids, shape (B, T).
        step_weights: Weight by step id, S + 1 of them.

    Returns:
        Weights, shape (B, T), float32.
    """
    weights = torch.zeros(targets.shape, device=targets.device)
    for step, weight in enumerate(step_weights):
        weights = torch.where(target_steps == step, weight, weights)
    return weights * (targets != IGNORE_INDEX)


@dataclass(frozen=True)
class Targets:
    """What every token predicts; each field has shape (B, T).

    Args:
        ids: Shifted labels; -100 is ignored.
        steps: Steps of the predicted tokens.
        weights: Loss weights of the predicted tokens, float32, 0 where ignored.
    """

    ids: Tensor
    steps: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        return Targets(self.ids.to(device), self.steps.to(device), self.weights.to(device))


def build_targets(labels: Tensor, step_ids: Tensor, step_weights: Sequence[float]) -> Targets:
    """Shift labels and steps under the tokens that predict them, and weight them.

    Args:
        labels: Labels, shape (B, T); -100 is ignored.
        step_ids: Step of each token, shape (B, T).
        step_weights: Weight by step id, S + 1 of them.
    """
    ids, steps = shift(labels, IGNORE_INDEX), shift(step_ids, 0)
    return Targets(ids, steps, token_weights(ids, steps, step_weights))


def chunk_size(vocab_size: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(256, _CHUNK_ELEMENTS // vocab_size)


def token_losses(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    scored: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of every target, float32, in chunks of tokens.

    Args:
        hidden: Last hidden states, shape (B, T, D), or logits with ``head`` the identity.
        targets: Shifted labels, shape (B, T); -100 gives 0.
        head: (N, D) -> logits (N, V).
        vocab_size: V, for the chunk size.
        scored: Run on these tokens alone, from ``scored_positions``, shape (N,); None means on all.

    Returns:
        Losses, shape (B, T), float32.
    """
    if scored is not None:
        chosen = hidden.flatten(0, 1).index_select(0, scored).unsqueeze(0)
        losses = token_losses(chosen, targets.flatten()[scored].unsqueeze(0), head, vocab_size)[0]
        return torch.zeros(targets.numel(), device=losses.device).scatter(0, scored, losses).view_as(targets)
    flat, flat_targets = hidden.flatten(0, 1), targets.flatten()
    chunk = chunk_size(vocab_size)

    def chunk_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORE_INDEX, reduction="none")

    if flat.shape[0] <= chunk:
        losses = chunk_loss(flat, flat_targets)
    else:
        losses = torch.cat(
            [
                checkpoint(chunk_loss, *part, use_reentrant=False)
                for part in zip(torch.split(flat, chunk), torch.split(flat_targets, chunk), strict=True)
            ]
        )
    return losses.view_as(targets)


def weighted_loss(losses: Tensor, weights: Tensor, total: Tensor | None = None, ranks: int = 1) -> Tensor:
    """Weighted mean of the losses, scaled so that the mean over ranks is the optimizer step's loss.

    The loss of an optimizer step is sum(weight * nll) / sum(weight) over all its micro-batches and all ranks.
    Example: losses [2, 4], weights [1, 0.5], total 4, ranks 2 give 4 * 2 / 4 = 2.

    Args:
        losses: Negative log-likelihoods of one micro-batch, shape (B, T).
        weights: Weights of the predicted tokens, shape (B, T), 0 where ignored.
        total: Sum of the weights of all micro-batches and ranks, a scalar; None means this micro-batch alone.
        ranks: Number of processes whose losses are averaged.

    Returns:
        A scalar. Without any weight it is 0 and still has a gradient, so that no rank leaves the others waiting.
    """
    total = weights.sum() if total is None else total.to(losses.device)
    return (losses * weights).sum() * ranks / total.clamp(min=torch.finfo(torch.float32).tiny)


def step_sums(values: Tensor, steps: Tensor, num_steps: int) -> Tensor:
    """Sum values by step id, (B, T) -> (S + 1,), in the dtype of the values, without waiting for the device."""
    sums = torch.zeros(num_steps + 1, dtype=values.dtype, device=values.device)
    return sums.scatter_add_(0, steps.flatten(), values.flatten())
