"""From tokens to routing decisions: step ids, the gate table, reproducible draws, dropped steps and positions.

Pure tensors in, pure tensors out; no model, no tokenizer, no attention. Every function has shapes that depend on the
shapes of its inputs alone, and none waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.model.config import MoteConfig

_MASK_63 = 0x7FFFFFFFFFFFFFFF


def _fill_forward(values: Tensor) -> Tensor:
    """The running maximum along the tokens: turns "index here, else -1" into "last index so far"."""
    return values.cummax(dim=1).values


def document_starts(input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Index of the first token of each token's document.

    A document starts at column 0 and wherever a position is not its left neighbor's plus one.
    Example: positions [0, 1, 2, 0, 1] give starts [0, 0, 0, 3, 3].

    Args:
        input_ids: Tokens, shape (B, T).
        position_ids: Positions, shape (B, T) or (1, T); None means one document per row.

    Returns:
        Start indices, shape (B, T), int64.
    """
    batch, length = input_ids.shape
    index = torch.arange(length, device=input_ids.device).expand(batch, length)
    if position_ids is None:
        return torch.zeros_like(index)
    position_ids = position_ids.expand(batch, length)
    continues = position_ids[:, 1:] == position_ids[:, :-1] + 1
    starts = F.pad(~continues, (1, 0), value=True)
    return _fill_forward(torch.where(starts, index, 0))


def marker_kinds(input_ids: Tensor, vocabulary: StepVocabulary) -> Tensor:
    """Tell markers from other tokens.

    Args:
        input_ids: Tokens, shape (B, T).
        vocabulary: Gives the marker ids.

    Returns:
        Kinds, shape (B, T), int64: +k where step k starts, -k where it ends, 0 elsewhere.
    """
    kinds = torch.zeros_like(input_ids, dtype=torch.int64)
    for step, (start, end) in enumerate(zip(vocabulary.start_ids, vocabulary.end_ids, strict=True), start=1):
        kinds = torch.where(input_ids == start, step, kinds)
        kinds = torch.where(input_ids == end, -step, kinds)
    return kinds


def step_ids_from_kinds(kinds: Tensor, starts: Tensor | None = None) -> Tensor:
    """The rule ``chain.vocabulary.advance`` for whole batches.

    Example: kinds [0, 1, 0, -1, 0] (text, start of step 1, text, its end, text) give [0, 1, 1, 1, 0].

    Args:
        kinds: +k where step k starts, -k where it ends, 0 elsewhere, shape (B, T), from ``marker_kinds``.
        starts: Start index of each token's document, shape (B, T); None means one document per row.

    Returns:
        Step ids, shape (B, T), int64: 0 for the question, k for the k-th step.
    """
    index = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds)
    opened_at = _fill_forward(torch.where(kinds > 0, index, -1))
    is_open = opened_at >= (0 if starts is None else starts)
    opened = torch.where(is_open, kinds.gather(1, opened_at.clamp(min=0)), 0)
    closes = (kinds < 0) & (kinds == -opened)
    closed_at = _fill_forward(torch.where(closes, index, -1))
    # Shifted by one: the end marker itself still belongs to the step that it closes.
    closed_before = F.pad(closed_at[:, :-1], (1, 0), value=-1)
    return torch.where(closed_before > opened_at, 0, opened)


def step_ids_from_tokens(
    input_ids: Tensor, vocabulary: StepVocabulary | MoteConfig, position_ids: Tensor | None = None
) -> Tensor:
    """The step of every token, read off the marker tokens alone; see ``chain.vocabulary.advance`` for the rule.

    Args:
        input_ids: Tokens from the first one on (not a slice that continues a cache), shape (B, T).
        vocabulary: The steps and their marker ids, or an adapter's configuration, which holds them.
        position_ids: Positions, shape (B, T) or (1, T); a jump marks a new document of a packed row.

    Returns:
        Step ids, shape (B, T), int64: 0 for the question, k for the k-th step.
    """
    if isinstance(vocabulary, MoteConfig):
        vocabulary = vocabulary.vocabulary
    starts = None if position_ids is None else document_starts(input_ids, position_ids)
    return step_ids_from_kinds(marker_kinds(input_ids, vocabulary), starts)


def gate_table(config: MoteConfig) -> Tensor:
    """Weight of every rank for every step, scaling included (MoTE, section 3.2).

    Row k (k >= 1) holds ``scaling * expert_weight`` on the columns of step k's expert and
    ``scaling * (1 - expert_weight)`` on the shared expert's. Row 0 is the question outside training: the mean over the
    step experts, or none of them with ``question_routing: shared``. A random draw replaces row 0 by a step's row.
    Example: two steps, r = 1, weight 0.5, scaling 1 give [[.25, .25, .5], [.5, 0, .5], [0, .5, .5]].

    Returns:
        Table, shape (S + 1, R), float32, with R = (S + 1) * r.
    """
    steps, r = config.num_steps, config.r
    per_expert = torch.zeros(steps + 1, steps + 1)
    per_expert[:, steps] = 1.0 - config.expert_weight
    per_expert[1:, :steps] = config.expert_weight * torch.eye(steps)
    if config.question_routing != "shared":
        per_expert[0, :steps] = config.expert_weight / steps
    return per_expert.repeat_interleave(r, dim=1) * config.scaling


def document_draws(
    input_ids: Tensor,
    documents: Tensor,
    valid: Tensor | None,
    *,
    seed: int,
    step: int,
    num_draws: int,
) -> Tensor:
    """Uniform numbers per document that depend on its tokens, the seed and the training step alone.

    The same document gets the same numbers however the rows are batched, packed, padded or spread over ranks, and again
    after resuming: there is no generator state to save.

    Args:
        input_ids: Tokens, shape (B, T).
        documents: Start index of each token's document, shape (B, T), from ``document_starts``.
        valid: False at padding, shape (B, T); None means no padding.
        seed: Seed of the run.
        step: Optimizer step, so that a document draws anew each time it is seen.
        num_draws: How many numbers per document, n.

    Returns:
        Numbers in [0, 1), shape (n, B, T), float32, constant within a document.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    keep = torch.ones_like(index) if valid is None else valid.to(torch.int64)
    count = keep.cumsum(1)
    # Position among the document's valid tokens: 0 at the first one, padded left or not.
    offset = count - count.gather(1, documents) + keep.gather(1, documents) - 1
    token_hash = _mix(_mix(input_ids + _as_int64(seed * 0x9E3779B9 + step)) + offset) * keep
    total = token_hash.cumsum(1)
    last = _last_of_document(documents, index)
    document_hash = total.gather(1, last) - total.gather(1, documents) + token_hash.gather(1, documents)
    salts = torch.arange(1, num_draws + 1, device=input_ids.device).view(-1, 1, 1)
    # A float32 tells 24 bits apart in [0, 1).
    return ((_mix(_mix(document_hash) + salts) >> 20) & 0xFFFFFF).to(torch.float32) / 0x1000000


def _last_of_document(documents: Tensor, index: Tensor) -> Tensor:
    """Index of the last token of each token's document, shape (B, T)."""
    is_last = torch.cat([documents[:, 1:] != documents[:, :-1], torch.ones_like(documents[:, :1]).bool()], dim=1)
    length = index.shape[1]
    reverse = torch.where(is_last, length - 1 - index, -1).flip(1)
    return length - 1 - _fill_forward(reverse).flip(1)


def _mix(x: Tensor) -> Tensor:
    """A 63-bit integer hash (the finalizer of SplitMix64 with the sign bit kept clear), elementwise, int64."""
    x = x & _MASK_63
    x = (x ^ (x >> 30)) * _as_int64(0xBF58476D1CE4E5B9)
    x = x & _MASK_63
    x = (x ^ (x >> 27)) * _as_int64(0x94D049BB133111EB)
    x = x & _MASK_63
    return x ^ (x >> 31)


def _as_int64(value: int) -> int:
    """Wrap a Python integer into the signed 64-bit range."""
    return (value + 2**63) % 2**64 - 2**63


def draw_question_step(draws: Tensor, num_steps: int) -> Tensor:
    """Turn one draw per document into a step id in 1..S for its question tokens, shape of ``draws``."""
    return 1 + (draws * num_steps).to(torch.int64).clamp(max=num_steps - 1)


def dropped_tokens(step_ids: Tensor, draws: Tensor, probabilities: Sequence[float]) -> Tensor:
    """Mark the tokens of dropped steps, which no later step sees (MoTE, section 3.3).

    Args:
        step_ids: Step of each token, shape (B, T).
        draws: One uniform number per droppable step, shape (n, B, T); row j belongs to step j + 1.
        probabilities: Probability of dropping each of these steps, n of them.

    Returns:
        True at tokens of dropped steps, shape (B, T), bool.
    """
    dropped = torch.zeros_like(step_ids, dtype=torch.bool)
    for step, (draw, probability) in enumerate(zip(draws, probabilities, strict=True), start=1):
        dropped = dropped | ((step_ids == step) & (draw < probability))
    return dropped


def positions_without_dropped(
    step_ids: Tensor, dropped: Tensor, documents: Tensor, num_steps: int, valid: Tensor | None = None
) -> Tensor:
    """Positions that follow visibility: how many earlier tokens of its document a token can see.

    Later tokens are counted as if a dropped step were absent; the dropped step's own tokens continue after what they
    can see. Example: question (2), analysis (2, dropped), response (2) gives [0, 1, 2, 3, 2, 3].

    Args:
        step_ids: Step of each token, shape (B, T).
        dropped: True at tokens of dropped steps, shape (B, T).
        documents: Start index of each token's document, shape (B, T).
        num_steps: S.
        valid: False at padding, which no token sees, shape (B, T); None means no padding.

    Returns:
        Positions, shape (B, T), int64.
    """
    index = torch.arange(step_ids.shape[1], device=step_ids.device).expand_as(step_ids)
    unseen = _count_before(dropped if valid is None else dropped | ~valid, documents)
    for step in range(1, num_steps + 1):
        own = step_ids == step
        unseen = torch.where(own, unseen - _count_before(dropped & own, documents), unseen)
    return index - documents - unseen


def _count_before(flags: Tensor, documents: Tensor) -> Tensor:
    """How many flags are set before each token within its document, shape (B, T), int64."""
    exclusive = flags.to(torch.int64).cumsum(1) - flags.to(torch.int64)
    return exclusive - exclusive.gather(1, documents)
