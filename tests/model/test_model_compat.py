"""What the model needs from torch, transformers and peft beyond their public names."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import peft.peft_model
import pytest
import torch
from kit import FAMILIES, base_model, chain, mote
from peft.helpers import disable_input_dtype_casting
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import nn
from transformers import AttentionInterface, GenerationMixin, MambaConfig, PreTrainedModel

from axolotl_mote.model import compat
from axolotl_mote.model.adapter import MoteLinear, MoteModel
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.markers import MarkerHead

pytestmark = pytest.mark.smoke  # against every version that is supported


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


# --- peft -----------------------------------------------------------------------------------------------------------


def test_the_type_is_registered_as_pefts_own_are() -> None:
    assert PeftType("MOTE") is PeftType.MOTE
    assert PeftType.MOTE in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MOTE"] is MoteConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["MOTE"] is MoteModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["MOTE"] == LoraModel.prefix
    assert "MOTE" not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    compat.register_peft_type("MOTE", MoteConfig, MoteModel)  # a second time changes nothing
    assert list(PeftType).count("MOTE") == 1


@pytest.mark.parametrize(
    "code", ["from axolotl_mote import step_ids_from_tokens", "import axolotl_mote, peft", "import peft, axolotl_mote"]
)
def test_importing_the_package_in_any_order_registers_the_type(code: str, tmp_path: Path) -> None:
    check = "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as t; assert t['MOTE'].__name__ == 'MoteModel'"
    done = subprocess.run([sys.executable, "-c", f"{code}; {check}"], cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_peft_still_decides_in_one_function_what_is_saved() -> None:
    places = (peft, peft.utils, peft.utils.save_and_load, peft.peft_model)
    (decides,) = {place.get_peft_model_state_dict for place in places}
    compat.save_adapter_alone("MOTE")  # a second time changes nothing
    assert peft.get_peft_model_state_dict is decides
    assert {"model", "adapter_name", "save_embedding_layers"} <= set(parameters(decides.__wrapped__))


def test_peft_still_refuses_layers_that_fused_kernels_bypass() -> None:
    model = nn.Module()
    model.config = MambaConfig()
    assert compat.bypasses_lora(model, "out_proj")
    assert not compat.bypasses_lora(model, "in_proj")


def test_peft_still_calls_the_methods_that_the_tuner_overrides() -> None:
    assert parameters(LoraModel.inject_adapter)[:3] == ["self", "model", "adapter_name"]
    assert "low_cpu_mem_usage" in parameters(LoraModel.inject_adapter)
    assert parameters(LoraModel._create_new_module)[:3] == ["lora_config", "adapter_name", "target"]
    assert parameters(LoraModel._enable_peft_forward_hooks) == ["self", "args", "kwargs"]
    assert parameters(LoraLayer.update_layer)[:5] == ["self", "adapter_name", "r", "lora_alpha", "config"]
    move = BaseTunerLayer._move_adapter_to_device_of_base_layer
    assert parameters(move) == ["self", "adapter_name", "device"]
    pairs = ((MoteModel, LoraModel), (MoteLinear, LoraLayer), (MarkerHead.__base__, BaseTunerLayer))
    overridden = {
        name
        for own, theirs in pairs
        for name, value in vars(own).items()
        if inspect.isfunction(value) and hasattr(theirs, name) and re.match("_[a-z]", name)
    }
    assert overridden == set(re.findall(r"``(_[a-z]\w+)``", compat.__doc__ or ""))


def test_tuner_layers_start_with_the_state_that_peft_reads() -> None:
    layer = BaseTunerLayer()
    compat.init_tuner_layer(layer, "first")
    assert (layer.active_adapters, layer.disable_adapters, layer.merged) == (["first"], False, False)
    assert set(vars(layer)) - {"cast_input_dtype_enabled"} <= set(vars(BaseTunerLayer))


def test_inputs_are_cast_unless_peft_is_told_not_to() -> None:
    model = mote()
    layer = next(module for module in model.modules() if isinstance(module, MoteLinear))
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert compat.cast_input(layer, x, torch.float32).dtype == torch.float32
    with disable_input_dtype_casting(model):
        assert compat.cast_input(layer, x, torch.float32).dtype == torch.bfloat16


# --- transformers ---------------------------------------------------------------------------------------------------


def test_the_kernel_call_takes_the_segments() -> None:
    needed = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "sliding_window", "softcap"}
    needed |= {"query_length", "is_causal", "dropout", "softmax_scale", "target_dtype", "attn_implementation", "kwargs"}
    assert needed <= set(parameters(compat.flash_attention_forward))
    first = ["query_states", "key_states", "value_states", "attention_mask"]
    assert parameters(compat.flash_attention_forward)[:4] == first
    assert parameters(compat.get_target_dtype) == ["query", "module"]


def test_the_registry_knows_the_functions_that_are_wrapped() -> None:
    names = set(compat.ALL_ATTENTION_FUNCTIONS.valid_keys())
    assert {"sdpa", "flex_attention", "flash_attention_2", "mote_varlen"} <= names
    assert compat.FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"].startswith("kernels-community/")
    takes = parameters(compat.ALL_ATTENTION_FUNCTIONS["sdpa"])
    assert takes[:5] == ["module", "query", "key", "value", "attention_mask"]


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_implementation_is_read_where_transformers_sets_it(name: str) -> None:
    model = base_model("llama", name)
    assert compat.attention_implementation(model.config) == name
    model.set_attn_implementation("flex_attention")
    assert compat.attention_implementation(model.config) == "flex_attention"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_module_is_found(family: str) -> None:
    layers = base_model(family).get_decoder().layers
    assert [len(list(compat.find_attention_modules(layer))) for layer in layers] == [1] * len(layers)


def test_models_say_whether_they_run_on_flex_attention() -> None:
    model = base_model()
    assert compat.supports_flex_attention(model)
    model._supports_flex_attn = False
    assert not compat.supports_flex_attention(model)
    assert "_supports_flex_attn" in vars(PreTrainedModel)


def test_an_intercepted_function_runs_where_the_interceptor_gives_nothing() -> None:
    calls = []

    def original(module: torch.nn.Module, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
        calls.append("original")
        return torch.zeros(1), None

    def attend(module: torch.nn.Module, query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor | None:
        calls.append("attend")
        return query if kwargs["scaling"] else None

    AttentionInterface.register("for_this_test", original)
    for _ in range(2):  # a second time changes nothing
        compat.intercept_attention("for_this_test", attend)
    compat.intercept_attention("not_registered", attend)
    assert "not_registered" not in compat.ALL_ATTENTION_FUNCTIONS
    function, states = compat.ALL_ATTENTION_FUNCTIONS["for_this_test"], [torch.ones(1)] * 3
    assert function(torch.nn.Identity(), *states, None, scaling=1.0)[0] is states[0]
    assert calls == ["attend"]
    assert function(torch.nn.Identity(), *states, None, scaling=0.0)[0] == 0
    assert calls == ["attend", "attend", "original"]


def test_recurrent_models_say_so() -> None:
    from transformers import MambaForCausalLM

    assert MambaForCausalLM._is_stateful
    assert not compat.carries_state(base_model())
    assert "_is_stateful" in vars(PreTrainedModel)


def test_generation_calls_the_methods_that_are_replaced() -> None:
    assert parameters(GenerationMixin.prepare_inputs_for_generation)[:2] == ["self", "input_ids"]
    model = mote().get_base_model()
    forward = model.forward
    fed = []

    @functools.wraps(forward)
    def spy(*args: object, **kwargs: object) -> object:
        fed.append(model.mote_routing.gate.shape[1])
        return forward(*args, **kwargs)

    model.forward = spy
    ids = torch.tensor([[5, 6, 7]])
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert fed[:2] == [3, 1]  # the whole question, then one token from the cache


def test_beam_search_needs_the_wide_vocabulary() -> None:
    """Without the patch its beams are decoded with the base model's width."""
    model = mote()
    ids = torch.tensor([chain()[:5]])
    sizes = []
    base = model.get_base_model()
    prepare = base.prepare_inputs_for_generation

    def spy(*args: object, **kwargs: object) -> object:
        sizes.append(base.config.vocab_size)
        return prepare(*args, **kwargs)

    base.prepare_inputs_for_generation = spy
    before = copy.deepcopy(base.config.vocab_size)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=3)
    assert set(sizes) == {before + 6}
    assert base.config.vocab_size == before
