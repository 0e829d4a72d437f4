"""The step of scheduled tokens: cut anywhere, the routing is that of the whole text."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import mote_config, naive_step_ids

from axolotl_mote.model.routing import gate_table
from axolotl_mote.serving.gate import Gate
from axolotl_mote.serving.routes import Route, Scheduled

CONFIG = mote_config(marker_ids=[4, 5, 6, 7, 8, 9])
ROUTE = Route.from_config(CONFIG)
TEXTS = st.lists(st.lists(st.integers(3, 11), min_size=1, max_size=30), min_size=1, max_size=5)


@settings(deadline=None)
@given(TEXTS, st.data())
def test_tokens_cut_anywhere_have_the_steps_of_the_whole_text(texts, data):
    cuts = [data.draw(st.integers(0, len(ids) - 1)) for ids in texts]
    wanted, scheduled, first, request, carry = [], [], [], [], []
    for number, (ids, cut) in enumerate(zip(texts, cuts, strict=True)):
        end = data.draw(st.integers(cut + 1, len(ids)))
        first.append(len(scheduled))
        scheduled += ids[cut:end]
        request += [number] * (end - cut)
        wanted += naive_step_ids(ids, CONFIG)[cut:end]
        before = torch.tensor(ids[:cut])
        steps = torch.tensor(naive_step_ids(ids[:cut], CONFIG))
        carry.append(int(ROUTE.after(before, steps)[-1]) if cut else 0)
    batch = Scheduled(*(torch.tensor(values) for values in (scheduled, first, request, carry)))
    assert batch.steps(ROUTE).tolist() == wanted


def test_carry_is_what_a_text_token_would_be_next():
    ids = [3, 4, 10, 5, 3, 6, 8, 9, 4, 7, 10]
    steps = torch.tensor(naive_step_ids(ids, CONFIG))
    following = [naive_step_ids([*ids[: n + 1], 10], CONFIG)[-1] for n in range(len(ids))]
    assert ROUTE.after(torch.tensor(ids), steps).tolist() == following


def test_rows_leave_out_the_scaling_that_vllm_puts_into_b():
    assert torch.equal(torch.tensor(ROUTE.rows) * CONFIG.scaling, gate_table(CONFIG))
    assert (ROUTE.rank, ROUTE.num_steps) == (8, 3)


def test_gate_serves_several_adapters_plain_lora_and_base_in_one_forward():
    other = Route.from_config(mote_config(steps=["think"], marker_ids=[8, 5], r=3, question_routing="shared"))
    gate = Gate(max_tokens=12, max_rank=8, device="cpu")
    assert not gate.set_routes([None, None, None])
    address = gate.rows.data_ptr()
    assert gate.set_routes([ROUTE, None, other])
    slots, steps = torch.tensor([0, 0, 1, 2, 2, -1]), torch.tensor([2, 0, 3, 1, 0, 1])
    gate.update(slots, lambda slot, route: steps.clamp(max=route.num_steps))
    ones = torch.ones(8)
    wanted = [torch.tensor(ROUTE.rows[2]), torch.tensor(ROUTE.rows[0]), ones]
    wanted += [torch.cat([torch.tensor(other.rows[k]), torch.ones(2)]) for k in (1, 0)]
    wanted += [torch.zeros(8)]  # a request of the base, to which vLLM gives the last slot's LoRA on a CPU
    assert torch.equal(gate.rows[:6], torch.stack(wanted))
    assert gate.rows.data_ptr() == address  # CUDA graphs read it
    slices = [torch.ones(6, 8), torch.full((6, 8), 2.0)]
    gate.multiply(slices)
    stacked = torch.ones(2, 6, 8)
    gate.multiply(stacked)
    assert torch.equal(slices[1], 2 * slices[0])
    assert torch.equal(stacked[0], slices[0])
    assert not gate.set_routes([None, None, None])
    assert torch.equal(gate.rows, torch.ones(12, 8))


def test_route_is_read_from_a_mote_folder_alone(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    assert Route.from_folder(tmp_path) == ROUTE
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"peft_type": "LORA"}))
    assert Route.from_folder(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"marker_ids": [4, 4, 6, 7, 8, 9]}))
    with pytest.raises(ValueError, match="marker_ids must hold 6 different ids"):
        Route.from_folder(tmp_path)


def test_the_gate_weights_what_every_platform_hands_over():
    gate = Gate(8, 4, "cpu")
    gate.rows.copy_(torch.arange(32.0).reshape(8, 4))
    one_tensor, slices = torch.ones(2, 3, 4), (torch.ones(3, 4), torch.ones(3, 4))
    gate.multiply(one_tensor)
    gate.multiply(slices)
    for part in (*one_tensor, *slices):
        assert torch.equal(part, gate.rows[:3])
