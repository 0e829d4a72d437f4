"""The Triton kernel, interpreted, against the function that training uses, on random tokens cut at random places."""

from __future__ import annotations

import pytest
import torch
from kit import mote_config, naive_step_ids

from axolotl_mote.serving.kernel import route_tokens

CONFIG = mote_config(marker_ids=[4, 5, 6, 7, 8, 9])


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("seed", range(12))
def test_kernel_gives_the_steps_of_the_whole_text(seed, block):
    generator = torch.Generator().manual_seed(seed)
    count, length = 5, (40, 300)[seed % 4 == 0]
    history = torch.randint(4, (14, 60, 2000)[seed % 3], (8, length), generator=generator, dtype=torch.int32)
    history[history > 9] += 100
    slots = torch.randperm(8, generator=generator)[:count]
    computed = torch.randint(0, length - 1, (count,), generator=generator)
    computed[0] = 0
    sizes = [int(torch.randint(1, length - c + 1, (1,), generator=generator)) for c in computed.tolist()]
    rows = list(zip(slots.tolist(), computed.tolist(), sizes, strict=True))
    tokens = torch.cat([history[s, c : c + n] for s, c, n in rows])
    first = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
    markers = torch.tensor(CONFIG.marker_ids, dtype=torch.int32)
    steps = route_tokens(markers, tokens, first, history, slots, computed, block)
    assert steps.tolist() == [k for s, c, n in rows for k in naive_step_ids(history[s, : c + n].tolist(), CONFIG)[c:]]
    assert any(steps.tolist()) or seed % 3 == 2  # markers are rare there
