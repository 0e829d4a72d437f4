"""What is refused when an adapter is loaded or a request comes in."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from kit import save_adapter, tiny_model, tiny_mote, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

pytest.importorskip("vllm")

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.serving import refusals
from axolotl_mote.serving.command import PROCESSOR

CODEC = ChainCodec.from_tokenizer(tiny_tokenizer())
WEIGHTS = "adapter_model.safetensors"


def params(**values: Any) -> Any:
    """Parameters of sampling as the engine gets them."""
    extra = {key: values.pop(key) for key in ("steps", "step_limit") if key in values}
    unset = dict.fromkeys(("allowed_token_ids", "bad_words", "min_tokens", "structured_outputs"))
    return SimpleNamespace(**unset | {"extra_args": extra or None, "max_tokens": 60} | values)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """An adapter of the three steps of the base, and one of two of them."""
    path = tmp_path_factory.mktemp("adapters")
    tiny_model().save_pretrained(path / "base")
    save_adapter(*tiny_mote(), path / "all", path / "base")
    save_adapter(*tiny_mote(("guidance", "response")), path / "two", path / "base")
    return path


def test_requests_without_steps_pass(adapters):
    refusals.check_sampling(params(min_tokens=5), str(adapters / "all"), CODEC, [])
    refusals.check_sampling(params(), None, None, [])


@pytest.mark.parametrize("name", ["allowed_token_ids", "bad_words", "min_tokens", "structured_outputs"])
def test_what_could_leave_no_token_is_refused(adapters, name):
    refusals.check_sampling(params(steps="adaptive"), str(adapters / "all"), CODEC, [PROCESSOR])
    with pytest.raises(ValueError, match=f"{name} must be left out of a request with steps"):
        refusals.check_sampling(params(steps="adaptive", **{name: [7]}), None, CODEC, [PROCESSOR])


def test_limits_are_those_of_the_engine():
    with pytest.raises(ValueError, match="must be at least"):
        refusals.check_sampling(params(steps=["analysis", "response"], max_tokens=3), None, CODEC, [PROCESSOR])
    for limit in (1 << 31, 1 << 63, 0, -1, True, "9"):
        with pytest.raises(ValueError, match="step_limit"):
            refusals.check_sampling(params(steps="adaptive", step_limit=limit), None, CODEC, [PROCESSOR])


def test_steps_need_a_step_grammar():
    for codec, processors in ((None, [PROCESSOR]), (CODEC, []), (CODEC, ["other:Processor"])):
        with pytest.raises(ValueError, match="a step grammar"):
            refusals.check_sampling(params(steps="adaptive"), None, codec, processors)


@pytest.mark.parametrize("steps", ["adaptive", ["analysis", "response"], "analysis+response"])
def test_steps_that_an_adapter_was_not_trained_on_are_refused(adapters, steps):
    refusals.check_sampling(params(steps=["guidance", "response"]), str(adapters / "two"), CODEC, [PROCESSOR])
    refusals.check_sampling(params(steps=steps), str(adapters / "all"), CODEC, [PROCESSOR])
    with pytest.raises(ValueError, match=r"steps must list steps of this adapter, \['guidance', 'response'\]"):
        refusals.check_sampling(params(steps=steps), str(adapters / "two"), CODEC, [PROCESSOR])


def test_steps_of_an_adapter_are_read_again_once_it_was_replaced(adapters, tmp_path):
    for name, is_refused in (("all", False), ("two", True), ("all", False)):
        (tmp_path / "adapter_config.json").write_bytes((adapters / name / "adapter_config.json").read_bytes())
        with pytest.raises(ValueError, match="steps must list") if is_refused else nullcontext():
            refusals.check_sampling(params(steps="adaptive"), str(tmp_path), CODEC, [PROCESSOR])


def test_adapters_that_are_whole_and_of_this_base_pass(adapters):
    base = str(adapters / "base")
    refusals.check_adapter(str(adapters / "all"), base, AutoConfig.from_pretrained(base))
    with pytest.raises(ValueError, match="adapter must fit the base model"):
        refusals.check_adapter(str(adapters / "all"), base, tiny_model(hidden=128).config)


def test_a_layer_that_is_missing_is_named(adapters, tmp_path):
    base, place = str(adapters / "base"), tmp_path / "all"
    place.mkdir()
    for file in (adapters / "all").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    tensors = {k: v for k, v in load_file(place / WEIGHTS).items() if ".layers.1.mlp" not in k}
    save_file(tensors, place / WEIGHTS)
    with pytest.raises(ValueError, match="must hold every tensor of the adapter"):
        refusals.check_adapter(str(place), base, AutoConfig.from_pretrained(base))


@pytest.mark.parametrize(
    ("loras", "gated", "is_mla", "lost"),
    [
        (["l.q_proj", "l.k_proj", "l.o_proj"], ["l.qkv_proj", "l.o_proj"], False, None),
        (["l.q_proj", "l.o_proj"], ["l.o_proj"], False, "l.q_proj"),
        (["l.q_proj", "l.o_proj", "vision.fc"], ["l.qkv_proj", "l.o_proj"], False, "vision.fc"),
        (["l.o_proj", "l.kv_b_proj"], ["l.o_proj", "l.kv_b_proj"], False, None),
        (["l.o_proj", "l.kv_b_proj"], ["l.o_proj", "l.kv_b_proj"], True, "l.kv_b_proj"),
    ],
)
def test_every_layer_of_an_adapter_must_be_applied(loras, gated, is_mla, lost):
    packed = {"l.qkv_proj": ["l.q_proj", "l.k_proj", "l.v_proj"]}
    if lost is None:
        refusals.check_layers(loras, gated, packed, is_mla)
        return
    with pytest.raises(ValueError, match=f"every layer of the adapter; it leaves out {lost}"):
        refusals.check_layers(loras, gated, packed, is_mla)


def test_several_cache_groups_are_refused_for_mote_adapters_alone(adapters, tmp_path):
    def runner(groups: int) -> Any:
        return SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=[None] * groups))

    values = json.loads((adapters / "all" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"peft_type": "LORA"}))
    refusals.refuse_groups(runner(1), str(adapters / "all"))
    refusals.refuse_groups(runner(2), str(tmp_path))
    with pytest.raises(ValueError, match="one KV cache group on the V1 runner; this model has 2"):
        refusals.refuse_groups(runner(2), str(adapters / "all"))


@pytest.mark.parametrize("asked", [None, object()])
@pytest.mark.parametrize("parser", ["mote", "", "qwen3"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_format_that_would_be_ignored_is_refused(asked: Any, parser: str, kept: bool) -> None:
    params = SimpleNamespace(structured_outputs=asked)
    formats = SimpleNamespace(reasoning_parser=parser, enable_in_reasoning=kept)
    if asked and parser == "mote" and not kept:
        with pytest.raises(ValueError, match=r"enable_in_reasoning true; this one would ignore it\. Start it with"):
            refusals.check_format(params, formats)
    else:
        refusals.check_format(params, formats)
