"""Checks of the loaded base model, and what is passed on to torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from axolotl.utils.dict import DictDefault
from kit import base_model

from axolotl_mote.training.base_model import compile_layers, prepare_base


def test_a_plain_base_is_taken() -> None:
    model = base_model("llama")
    model.hf_device_map = {"": "cpu"}
    assert prepare_base(model, DictDefault({}), (0.3, 0.3)) is model


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_a_base_that_was_not_quantized_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must quantize the base model; got one in torch.float32"):
        prepare_base(base_model("llama"), DictDefault({key: True}), ())


def test_a_model_over_several_devices_is_refused() -> None:
    model = base_model("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ValueError, match="must be on one device per process"):
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


def test_checkpointing_that_loses_gradients_is_refused() -> None:
    """As of Gemma 3n, and of Gemma 4's small models."""
    model = base_model("llama")
    cfg = DictDefault({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}})
    prepare_base(model, cfg, ())
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ValueError, match=r"use_reentrant must be false where .* share keys and values.*1 such layers"):
        prepare_base(model, cfg, ())
    for other in (
        {"gradient_checkpointing": False},
        {"inference": True},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing_kwargs": None},
    ):
        prepare_base(model, DictDefault({**cfg, **other}), ())


@pytest.mark.parametrize("fixed", [False, True])
def test_compiling_uses_the_options_of_axolotl(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = base_model("llama"), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: told.append(kwargs))
    model.get_base_model = lambda: model
    packing = {"sample_packing": True, "pad_to_sequence_len": fixed}
    compiling = {"torch_compile_backend": "eager", "torch_compile_mode": "max-autotune"}
    compile_layers(model, DictDefault(packing | compiling))
    wanted = {"backend": "eager", "mode": "max-autotune", "options": None, "dynamic": None if fixed else True}
    assert told == [wanted] * len(model.model.layers)


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, ["dynamic"]),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}, ["longrope"]),
        ({"rope_type": "yarn", "factor": 2.0}, []),
        (None, []),
    ],
)
def test_rotary_embeddings_that_depend_on_batch_mates_are_named(
    rope: dict | None, named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = base_model()
    model.config.rope_parameters = rope
    with caplog.at_level("WARNING", logger="axolotl.mote"):
        prepare_base(model, DictDefault(), ())
    messages = [record.message for record in caplog.records if "rope_type" in record.message]
    assert len(messages) == len(named)
    for message, kind in zip(messages, named, strict=True):
        assert f"rope_type '{kind}'" in message
