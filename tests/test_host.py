"""What is refused once the base model is there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from axolotl.utils.dict import DictDefault
from tiny_models import base_model

from axolotl_mote import attention
from axolotl_mote.attention import VARLEN, _by_segment
from axolotl_mote.host import compile_layers, prepare_base
from axolotl_mote.masks import Segments


def test_a_plain_base_is_taken() -> None:
    model = base_model("llama")
    model.hf_device_map = {"": "cpu"}
    assert prepare_base(model, DictDefault({}), (0.3, 0.3)) is model


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_a_base_that_was_not_quantized_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must quantize the base model; it was loaded in torch.float32"):
        prepare_base(base_model("llama"), DictDefault({key: True}), ())


def test_a_model_over_several_devices_is_refused() -> None:
    model = base_model("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ValueError, match="must lie on one device per process"):
        prepare_base(model, DictDefault({}), ())


def test_fp8_attention_is_refused_with_step_dropout_only() -> None:
    cfg = DictDefault({"attn_implementation": "fp8"})
    with pytest.raises(ValueError, match="attn_implementation must not be fp8"):
        prepare_base(base_model("llama"), cfg, (0.3,))
    prepare_base(base_model("llama"), cfg, (0.0,))


def test_a_layer_with_attention_of_its_own_is_refused() -> None:
    model = base_model("llama")
    module = model.model.layers[-1].self_attn
    module.config = copy.deepcopy(module.config)
    module.config._attn_implementation = "mine"
    with pytest.raises(ValueError, match=r"must run on one attention implementation; got .*'mine'"):
        prepare_base(model, DictDefault({}), (0.3,))


@pytest.mark.parametrize("flash", [True, False])
def test_attention_sinks_reach_the_kernel_or_are_refused(flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def kernel(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.update(kwargs)
        return q

    monkeypatch.setattr(attention, "_flash_attention_forward", kernel)
    tokens, starts = torch.arange(3), torch.tensor([0, 3], dtype=torch.int32)
    segments = Segments(tokens, tokens, tokens, starts, starts, 3, 3)
    module = base_model("llama").model.layers[0].self_attn
    states, sinks = [torch.randn(1, 2, 3, 8) for _ in range(3)], torch.tensor([1.0, 2.0])
    if flash:
        _by_segment(module, *states, segments, True, {"s_aux": sinks})
        assert torch.equal(seen["s_aux"], sinks)
    else:
        with pytest.raises(NotImplementedError, match=f"{VARLEN}.* attention sinks"):
            _by_segment(module, *states, segments, False, {"s_aux": sinks})


def test_compiling_hands_on_what_axolotl_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = base_model("llama"), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: told.append(kwargs))
    model.get_base_model = lambda: model
    compile_layers(model, DictDefault({"torch_compile_backend": "eager", "torch_compile_mode": "max-autotune"}))
    assert told == [{"backend": "eager", "mode": "max-autotune", "options": None}] * len(model.model.layers)
