"""The routing of the V2 runner as one Triton kernel, one program per request.

That runner keeps every request's tokens on the device, so nothing is remembered between forwards: the carry is read off
the history, backwards from the last computed token to the last start marker and no further. `Scheduled.steps` and
`step_ids_from_tokens` are its oracles in the tests; on a CPU it runs under Triton's interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton


@triton.jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b)


@triton.jit
def _carry(row_ptr, computed, markers_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The step that goes on after the computed tokens: that of the last start marker, unless its end marker follows."""
    lane = tl.arange(0, BLOCK)
    opened = tl.full((), -1, tl.int32)
    carry = tl.full((), 0, tl.int32)
    stop = computed
    while (stop > 0) & (opened < 0):
        place = stop - BLOCK + lane
        token = tl.load(row_ptr + place, mask=place >= 0, other=-1)
        for k in tl.static_range(STEPS):
            found = tl.max(tl.where(token == tl.load(markers_ptr + 2 * k), place, -1), axis=0)
            carry = tl.where(found > opened, k + 1, carry)
            opened = tl.maximum(found, opened)
        stop -= BLOCK
    end_marker = tl.load(markers_ptr + tl.maximum(2 * carry - 1, 0))
    place = tl.where(carry > 0, opened + 1, computed)
    while place < computed:
        token = tl.load(row_ptr + place + lane, mask=place + lane < computed, other=-1)
        is_closed = tl.max((token == end_marker).to(tl.int32), axis=0) > 0
        carry = tl.where(is_closed, 0, carry)
        place = tl.where(is_closed, computed, place + BLOCK)
    return carry


@triton.jit
def _route(  # type: ignore[no-untyped-def]
    steps_ptr,
    tokens_ptr,
    first_ptr,
    slot_ptr,
    computed_ptr,
    history_ptr,
    stride,
    markers_ptr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    row_ptr = history_ptr + tl.load(slot_ptr + request).to(tl.int64) * stride
    computed = tl.load(computed_ptr + request).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    begin = tl.load(first_ptr + request)
    count = tl.load(first_ptr + request + 1) - begin
    # The last start marker so far is (its place, its step) in one number, 16 * place + step, hence MAX_STEPS; the carry
    # is at place 0.
    last = _carry(row_ptr, computed, markers_ptr, STEPS, BLOCK)
    closes_before = tl.full((), 0, tl.int32)  # end markers that closed something, in all blocks so far
    closes_at_start = tl.full((), 0, tl.int32)  # the same when the last start marker came
    offset = tl.full((), 0, tl.int32)
    while offset < count:
        valid = offset + lane < count
        token = tl.load(tokens_ptr + begin + offset + lane, mask=valid, other=-1)
        starts = tl.zeros((BLOCK,), tl.int32)
        ends = tl.zeros((BLOCK,), tl.int32)
        for k in tl.static_range(STEPS):
            starts = tl.where(token == tl.load(markers_ptr + 2 * k), k + 1, starts)
            ends = tl.where(token == tl.load(markers_ptr + 2 * k + 1), k + 1, ends)
        key = tl.where(starts > 0, 16 * (offset + lane + 1) + starts, 0)
        key = tl.maximum(tl.associative_scan(key, 0, _larger), last)
        closes = ((ends > 0) & (ends == key % 16)).to(tl.int32)
        total = tl.cumsum(closes, 0) + closes_before
        at_start = tl.maximum(tl.associative_scan(tl.where(starts > 0, total, 0), 0, _larger), closes_at_start)
        is_open = total - closes == at_start  # an end marker still belongs to the step that it closes
        tl.store(steps_ptr + begin + offset + lane, tl.where(is_open, key % 16, 0).to(tl.int64), mask=valid)
        last = tl.max(key, axis=0)
        closes_before = tl.max(total, axis=0)
        closes_at_start = tl.max(at_start, axis=0)
        offset += BLOCK


def route_tokens(
    markers: Tensor, tokens: Tensor, first: Tensor, history: Tensor, slots: Tensor, computed: Tensor, block: int = 1024
) -> Tensor:
    """Step of every scheduled token.

    Args:
        markers: Start and end id of each step, (2S,), S at most ``routes.MAX_STEPS``.
        tokens: Scheduled tokens, request after request, (T,).
        first: Index of each request's first token, and T, (N + 1,).
        history: Token ids of every request that the engine holds, (rows, L).
        slots: Row of each request in the history, (N,).
        computed: Tokens of each request that are in the KV cache, (N,).
        block: Tokens that a program looks at in one go; a power of two.

    Returns:
        Steps, (T,), int64.
    """
    steps = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    _route[(len(slots),)](
        steps,
        tokens,
        first,
        slots,
        computed,
        history,
        history.stride(0),
        markers,
        STEPS=len(markers) // 2,
        BLOCK=block,
    )
    return steps
