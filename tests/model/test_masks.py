"""The visibility rule against shortened chains, and its forms against each other, on sizes that no block divides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kit import chain, mote_config

from axolotl_mote.model.attention import segment_attention
from axolotl_mote.model.masks import Visibility, build_block_mask, build_dense_mask, build_segments
from axolotl_mote.model.routing import document_starts, positions_without_dropped, step_ids_from_tokens

FIRST, SECOND, SINGLE = chain(20, 8, 7, 10, seed=1), chain(15, 5, 4, 9, seed=2), chain(30, 10, 0, 25, seed=3)
LENGTH = 97


def placed(padding: str) -> list[tuple[int, int, list[int]]]:
    """(row, first column, tokens) of every document: two packed ones, and one with padding on the given side."""
    return [(0, 0, FIRST), (0, len(FIRST), SECOND), (1, 0 if padding == "right" else LENGTH - len(SINGLE), SINGLE)]


def visibility(dropped: tuple[int, ...], padding: str = "right") -> Visibility:
    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    valid = torch.zeros(2, LENGTH, dtype=torch.bool)
    positions = torch.arange(LENGTH).repeat(2, 1)
    for row, start, tokens in placed(padding):
        ids[row, start : start + len(tokens)], valid[row, start : start + len(tokens)] = torch.tensor(tokens), True
    positions[0, len(FIRST) :] = torch.arange(LENGTH - len(FIRST))
    documents = document_starts(ids, positions)
    steps = step_ids_from_tokens(ids, mote_config(), positions)
    is_dropped = torch.isin(steps, torch.tensor(dropped, dtype=torch.long))
    return Visibility(
        documents, steps, is_dropped, positions_without_dropped(steps, is_dropped, documents, 3, valid), valid
    )


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dropped", [(), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_token_sees_the_shortened_chain_up_to_itself(
    dropped: tuple[int, ...], window: int | None, padding: str
) -> None:
    """A token's shortened chain is its document without the dropped steps, except its own."""
    mask = build_dense_mask(visibility(dropped, padding), window)[:, 0]
    assert mask.shape == (2, LENGTH, LENGTH)
    assert mask.any(-1).all()  # every row of the softmax has a key, padding included
    for row, start, tokens in placed(padding):
        steps = mote_config().vocabulary.step_ids(tokens)
        for token, own in enumerate(steps):
            shortened = [t for t in range(token + 1) if steps[t] == own or steps[t] not in dropped]
            seen = shortened[-window:] if window else shortened
            assert mask[row, start + token].nonzero().flatten().tolist() == [start + t for t in seen]


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
