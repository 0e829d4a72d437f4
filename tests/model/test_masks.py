"""Every form of the visibility rule against the rule itself, on sizes that no block divides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kit import chain, mote_config

from axolotl_mote.model.attention import segment_attention
from axolotl_mote.model.masks import Visibility, build_block_mask, build_dense_mask, build_segments
from axolotl_mote.model.routing import document_starts, positions_without_dropped, step_ids_from_tokens


def visibility(dropped: tuple[int, ...], padding: str = "right") -> Visibility:
    """Two rows: one with two packed documents, one with padding on the given side; 97 tokens."""
    first, second = chain(20, 8, 7, 10, seed=1), chain(15, 5, 4, 9, seed=2)
    single = chain(30, 10, 0, 25, seed=3)
    length = 97
    ids = torch.zeros(2, length, dtype=torch.long)
    valid = torch.zeros(2, length, dtype=torch.bool)
    positions = torch.arange(length).repeat(2, 1)
    packed = first + second
    ids[0, : len(packed)], valid[0, : len(packed)] = torch.tensor(packed), True
    positions[0, len(first) :] = torch.arange(length - len(first))
    start = 0 if padding == "right" else length - len(single)
    ids[1, start : start + len(single)], valid[1, start : start + len(single)] = torch.tensor(single), True
    documents = document_starts(ids, positions)
    steps = step_ids_from_tokens(ids, mote_config(), positions)
    is_dropped = torch.isin(steps, torch.tensor(dropped, dtype=torch.long))
    return Visibility(
        documents, steps, is_dropped, positions_without_dropped(steps, is_dropped, documents, 3, valid), valid
    )


def rule(v: Visibility, b: int, q: int, kv: int, window: int | None) -> bool:
    """The rule in words: document AND causal AND not dropped AND window, and every token sees itself."""
    if q == kv:
        return True
    allowed = kv < q and v.documents[b, q] == v.documents[b, kv] and bool(v.valid[b, kv])
    allowed = allowed and (not v.dropped[b, kv] or v.step_ids[b, kv] == v.step_ids[b, q])
    return bool(allowed and (window is None or v.positions[b, q] - v.positions[b, kv] < window))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dropped", [(), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_dense_mask_is_the_rule(dropped: tuple[int, ...], window: int | None, padding: str) -> None:
    v = visibility(dropped, padding)
    mask = build_dense_mask(v, window)
    assert mask.shape == (2, 1, 97, 97)
    expected = [[[rule(v, b, q, kv, window) for kv in range(97)] for q in range(97)] for b in range(2)]
    assert torch.equal(mask[:, 0], torch.tensor(expected))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dropped", [(), (1,), (1, 2)])
def test_flex_and_segments_attend_as_the_dense_mask(dropped: tuple[int, ...], window: int | None) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    v = visibility(dropped)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 97, 16, generator=generator)
    key, value = (torch.randn(2, 2, 97, 16, generator=generator) for _ in range(2))
    dense = F.scaled_dot_product_attention(query, key, value, build_dense_mask(v, window), enable_gqa=True)
    flex = flex_attention(query, key, value, block_mask=build_block_mask(v, window), enable_gqa=True)
    real = v.valid[:, None, :, None].expand_as(dense)
    assert torch.allclose(flex[real], dense[real], atol=2e-6)

    segments = build_segments(v)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out = segment_attention(
        flat[0][segments.queries], flat[1][segments.keys], flat[2][segments.keys], segments, 16**-0.5, window
    )
    out = out[segments.inverse].unflatten(0, (2, 97)).transpose(1, 2)
    assert torch.allclose(out[real], dense[real], atol=2e-6)


def test_only_dropped_steps_gather_keys_twice() -> None:
    assert len(build_segments(visibility(())).keys) == 2 * 97
    v = visibility((1,))
    extra = 20 + 15 + 30  # the three questions, seen by the three dropped analyses
    assert len(build_segments(v).keys) == 2 * 97 + extra
