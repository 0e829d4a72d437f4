"""What PEFT's common test suite asks of every adapter type, for MOTE: copies, pickles, disabling, several adapters.

Merging, weighted combination and mixed batches are refused on purpose.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import (
    MARKER_IDS,
    VOCABULARY,
    base_model,
    chain,
    mote,
    mote_config,
    randomize,
    save_adapter,
    tiny_model,
    tiny_mote,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from axolotl_mote.generation.loading import load_mote
from axolotl_mote.model.adapter import add_mote_adapter, mote_model
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.routed import RoutedModel
from axolotl_mote.model.routing import step_ids_from_tokens

IDS = torch.tensor([chain(), chain(5, 4, 3, 6, seed=1)])
SHORT = torch.tensor([chain(5, 4, 0, 6)])  # without guidance, whose markers the second adapter does not know
INSIDE = list(range(VOCABULARY - 6, VOCABULARY))  # markers that the base's table holds, as in Llama-3, Qwen and Gemma
PLACES = {"beyond": MARKER_IDS, "inside": INSIDE}


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    result: Tensor = model(input_ids=ids).logits
    return result


def generate(model: Any, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids=IDS[:, :9], attention_mask=torch.ones_like(IDS[:, :9]), **options).tolist()


def change(model: Any) -> None:
    """Other experts and marker rows, so that using a stale copy shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "marker_rows" in name:
                parameter.neg_().mul_(3)


# --- copies and pickles ---------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    ("family", "copied"),  # with transformers 5.16 most bases, Llama among them, cannot be pickled themselves
    [("llama", copy.deepcopy), ("llama_tied", copy.deepcopy), ("phi3", pickled), ("phi3", saved_whole)],
)
def test_a_copy_is_a_model_of_its_own(family: str, copied: Callable[[Any], Any]) -> None:
    model = mote(family)
    expected, answers = logits(model), generate(model)
    twin = copied(model)
    assert torch.equal(logits(twin), expected)
    assert generate(twin) == answers
    change(twin)
    changed = generate(twin)
    assert changed != answers
    assert torch.equal(logits(model), expected)
    assert generate(model) == answers
    change(model)  # the same weights again, now in the original
    assert generate(model) == changed
    assert generate(twin) == changed
    assert mote_model(twin).routing is not mote_model(model).routing


def test_a_copy_of_the_inner_model_is_one_too() -> None:
    model = mote()
    inner = copy.deepcopy(model.get_base_model())
    answers = generate(inner)
    change(model)
    assert generate(inner) == answers != generate(model)


def test_a_copied_model_trains_alone() -> None:
    model = mote()
    twin = copy.deepcopy(model)
    twin.train()
    twin(input_ids=IDS).logits[..., :VOCABULARY].sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for name, p in twin.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_unload_returns_the_base_as_it_was(family: str) -> None:
    base = base_model(family)
    kind, expected = type(base), logits(base, IDS % VOCABULARY)
    hooks = len(base._forward_pre_hooks)
    model = add_mote_adapter(base, mote_config())
    randomize(model)
    assert isinstance(base, RoutedModel)
    assert type(base).__name__ == kind.__name__
    returned = model.unload()
    assert returned is base
    assert type(base) is kind
    assert not any(isinstance(value, type(mote_model)) for value in vars(base).values())
    assert len(base._forward_pre_hooks) == hooks
    assert not any(hasattr(module, "mote_holder") for module in base.modules())
    assert torch.equal(logits(base, IDS % VOCABULARY), expected)
    embedded = base.get_input_embeddings()(IDS % VOCABULARY)
    assert torch.equal(base(inputs_embeds=embedded).logits, expected)
    base.generate(input_ids=IDS[:, :5], max_new_tokens=2, pad_token_id=0, do_sample=False)
    again = add_mote_adapter(base, mote_config())  # and it can carry an adapter again
    assert logits(again).shape[-1] == max(MARKER_IDS) + 1


def test_the_class_of_a_routed_model_makes_plain_models(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path)
    inner = mote().get_base_model()
    for made in (type(inner)(inner.config), type(inner).from_pretrained(tmp_path)):
        assert not isinstance(made, RoutedModel)
        assert type(made) is type(base_model())


def test_what_passes_the_models_call_by_is_refused_not_answered_with_an_older_routing() -> None:
    model = mote()
    generate(model)
    for run in (model.get_base_model().model, model.get_base_model().forward):
        with pytest.raises(RuntimeError, match="must be routed before a layer runs"):
            run(input_ids=IDS)


def test_positional_arguments_are_routed_as_named_ones() -> None:
    base = mote().get_base_model()
    row = torch.tensor([chain()[:12] + chain(seed=1)])
    positions = torch.tensor([[*range(12), *range(25)]])
    named = base(input_ids=row, position_ids=positions).logits
    assert torch.equal(base(row, None, positions).logits, named)
    cache = base(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="step_ids must be given when input_ids continue a cache"):
        base(IDS[:, :1], None, None, cache)


@pytest.mark.parametrize("place", PLACES)
def test_the_models_own_loss_knows_the_markers(place: str) -> None:
    model = mote(marker_ids=PLACES[place])
    ids = torch.where(IDS >= VOCABULARY, IDS + PLACES[place][0] - VOCABULARY, IDS)
    out = model(input_ids=ids, labels=ids)
    width = out.logits.shape[-1]
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, width), ids[:, 1:].reshape(-1))
    assert torch.allclose(out.loss, expected)
    assert model.config.vocab_size == VOCABULARY


def test_a_forward_in_inference_mode_leaves_the_model_trainable() -> None:
    model = add_mote_adapter(base_model(), mote_config(marker_ids=INSIDE))
    with torch.inference_mode():
        model(input_ids=IDS % VOCABULARY)
    model.train()
    model(input_ids=IDS % VOCABULARY).logits.sum().backward()


def test_a_replica_of_data_parallel_can_be_made() -> None:
    base = mote().get_base_model()
    replica = base._replicate_for_data_parallel()
    assert type(replica) is type(base)
    assert replica.mote_routing is base.mote_routing


# --- disabling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3"])
@pytest.mark.parametrize("training", [False, True])
def test_a_disabled_adapter_is_the_base_bit_for_bit(family: str, place: str, training: bool) -> None:
    ids = torch.arange(2 * 40).reshape(2, 40) + VOCABULARY - 80  # every token of the table's end
    base = base_model(family).train(training)
    expected = logits(base, ids)
    answers = base.generate(input_ids=ids[:, :9], max_new_tokens=6, num_beams=2, pad_token_id=0, do_sample=False)
    model = add_mote_adapter(base, mote_config(marker_ids=PLACES[place])).train(training)
    randomize(model)
    mote_model(model).routing.step_dropout = (0.5, 0.5)
    before = logits(model, ids)
    assert not torch.equal(before[..., :VOCABULARY], expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
        embeddings = model.get_input_embeddings()(ids)
        assert torch.equal(embeddings, base.get_input_embeddings().base_layer(ids))
        assert torch.equal(model(inputs_embeds=embeddings).logits, expected)
        beams = model.generate(input_ids=ids[:, :9], max_new_tokens=6, num_beams=2, pad_token_id=0, do_sample=False)
        assert torch.equal(beams, answers)
    assert torch.equal(logits(model, ids), before)


# --- embeddings as input --------------------------------------------------------------------------------------------


def test_embeddings_come_with_their_steps() -> None:
    model = mote()
    steps = step_ids_from_tokens(IDS, mote_config())
    embedded = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embedded, step_ids=steps).logits, logits(model))
    with pytest.raises(ValueError, match="input_ids must be given"):
        model(inputs_embeds=embedded)
    model.train()
    mote_model(model).routing.step_dropout = (0.5, 0.5)
    model(inputs_embeds=embedded, step_ids=steps).logits[..., :VOCABULARY].sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


# --- several adapters -----------------------------------------------------------------------------------------------

TWO_STEPS = {"steps": ["analysis", "response"], "marker_ids": [96, 97, 100, 101], "r": 3, "lora_alpha": 3}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of the same base: other steps, other ranks, other markers."""
    for name, values in (("one", {}), ("two", TWO_STEPS)):
        model = mote(**values)
        if name == "two":
            change(model)
        model.save_pretrained(tmp_path / name)
    return tmp_path / "one", tmp_path / "two"


def alone(folder: Path, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(base_model(), folder, **options)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_adapters_are_added_switched_and_deleted(family: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    mote(family).save_pretrained(one)
    other = mote(family, **TWO_STEPS)
    change(other)
    other.save_pretrained(two)

    def loaded(folder: Path) -> tuple[Tensor, list[list[int]]]:
        model = PeftModel.from_pretrained(base_model(family), folder)
        return logits(model, SHORT), generate(model)

    first, second = loaded(one), loaded(two)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(base_model(family), one, adapter_name="one", **options)
    model.load_adapter(two, "two", **options)
    assert not any(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert torch.equal(logits(model, SHORT), first[0])
        assert generate(model) == first[1]
        model.set_adapter("two")
        assert torch.equal(logits(model, SHORT), second[0])
        assert generate(model) == second[1]
        model.set_adapter("one")
    with pytest.raises(NotImplementedError, match=r"One MoTE adapter must be active at a time; got \['one', 'two'\]"):
        model.base_model.set_adapter(["one", "two"])
    with pytest.raises(NotImplementedError, match="adapter_names must not be given"):
        model(input_ids=IDS, adapter_names=["one", "two"])
    model.save_pretrained(tmp_path / "chosen", selected_adapters=["two"])
    assert [path.name for path in (tmp_path / "chosen").iterdir() if path.is_dir()] == ["two"]
    assert (
        load_file(tmp_path / "chosen" / "two" / "adapter_model.safetensors").keys()
        == load_file(two / "adapter_model.safetensors").keys()
    )
    assert torch.equal(loaded(tmp_path / "chosen" / "two")[0], second[0])
    with pytest.warns(UserWarning, match="Adapter one was active which is now deleted"):
        model.delete_adapter("one")
    assert torch.equal(logits(model, SHORT), second[0])
    assert generate(model) == second[1]
    assert not any(".one." in name for name in model.state_dict())
    assert list(mote_model(model).routing.configs) == ["two"]
    model.delete_adapter("two")
    left = model.base_model.model  # PEFT's own wrapper cannot run without any adapter
    assert torch.equal(logits(left, IDS % VOCABULARY), logits(base_model(family), IDS % VOCABULARY))


def test_only_the_active_adapter_is_trained(folders: tuple[Path, Path]) -> None:
    model = alone(folders[0], is_trainable=True)
    model.load_adapter(folders[1], "two", is_trainable=True)
    for active, idle in (("default", "two"), ("two", "default")):
        model.set_adapter(active)
        model.zero_grad(set_to_none=True)
        model.train()
        model(input_ids=SHORT).logits[..., :VOCABULARY].sum().backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert any("marker_rows" in name for name in trained)
        assert any("lora_A" in name for name in trained)
        assert not any(f".{idle}." in name for name in trained)
        wanted = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == wanted


def test_an_added_adapter_leaves_the_active_one_alone() -> None:
    model = mote()
    expected = logits(model)
    model.add_adapter("fresh", mote_config(r=3, lora_alpha=3))
    assert torch.equal(logits(model), expected)
    model.set_adapter("fresh")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("plain", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="marker_ids must be set"):
        model.add_adapter("unknown", mote_config(marker_ids=[]))
    assert sorted(model.peft_config) == ["default", "fresh"]


@pytest.mark.parametrize("place", ["config", "generation_config"])
@pytest.mark.parametrize(("name", "value"), [("eos_token_id", [90, 97]), ("pad_token_id", 97)])
def test_markers_that_end_a_generation_are_refused(place: str, name: str, value: object) -> None:
    base = base_model()
    setattr(getattr(base, place), name, value)
    with pytest.raises(ValueError, match=rf"marker_ids must be tokens that nothing else uses; got 97, .*{name}"):
        add_mote_adapter(base, mote_config())


def test_an_adapter_on_fewer_layers_leaves_the_others_alone() -> None:
    base = base_model()
    model = add_mote_adapter(base, mote_config(target_modules=["q_proj"]))
    model.add_adapter("wide", mote_config(target_modules=["q_proj", "v_proj"]))
    randomize(model)
    narrow = add_mote_adapter(base_model(), mote_config(target_modules=["q_proj"]))
    narrow.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(logits(model.eval()), logits(narrow.eval()))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_onto_a_half_precision_base_rounds_nothing(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = mote()
    model.save_pretrained(tmp_path)
    half = base_model().to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(half, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    saved = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        if "lora_" in name:
            assert torch.equal(tensor, saved[name]), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_resized_table_is_not_saved_with_the_adapter(tied: bool, tmp_path: Path) -> None:
    """AutoPeft resizes the base's table to the saved tokenizer; PEFT then takes it for trained."""
    model, tokenizer = tiny_mote(tied=tied)
    tiny_model(tied=tied).save_pretrained(tmp_path / "base")
    first = save_adapter(model, tokenizer, tmp_path / "first", tmp_path / "base")
    loaded = AutoPeftModelForCausalLM.from_pretrained(first).eval()
    assert len(loaded.get_input_embeddings().base_layer.weight) == len(tokenizer) > 259
    second = save_adapter(loaded, tokenizer, tmp_path / "second")
    assert {name: x.shape for name, x in load_file(first / FILE).items()} == {
        name: x.shape for name, x in load_file(second / FILE).items()
    }
    ids = torch.tensor([[3, 259, 4, 260, 261, 5, 262, 6]])
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(second), ids), logits(loaded, ids))
    assert torch.equal(logits(load_mote(second)[0], ids), logits(model, ids))
    with pytest.raises(ValueError, match="save_embedding_layers must not be true with a MOTE adapter"):
        loaded.save_pretrained(tmp_path / "third", save_embedding_layers=True)


# --- incomplete and foreign adapters --------------------------------------------------------------------------------

FILE = "adapter_model.safetensors"


def drop(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a layer is missing": (lambda t: drop(t, "layers.1"), r"14 of 30 missing \(base_model.model.model.layers.1.mlp"),
    "the markers are missing": (lambda t: drop(t, "marker_rows"), r"2 of 30 missing \(base_model.model.lm_head"),
    "one tensor is missing": (lambda t: dict(sorted(t.items())[1:]), "1 of 30 missing"),
    "nothing is there": (lambda t: {}, "30 of 30 missing"),
    "a tensor too many": (
        lambda t: {**t, "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(2)},
        "1 of 30 unknown",
    ),
    "another rank": (lambda t: {n: x[:4] if "lora_A" in n else x for n, x in t.items()}, r"14 of 30 of another shape"),
    "another base": (lambda t: {n: torch.zeros(9, 9) for n in t}, r"30 of 30 of another shape \(.*: \(9, 9\) for"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_partial_or_foreign_adapter_is_refused(case: str, tmp_path: Path) -> None:
    mote().save_pretrained(tmp_path)
    breaks, message = BROKEN[case]
    save_file(breaks(load_file(tmp_path / FILE)), tmp_path / FILE)
    with pytest.raises(ValueError, match=message) as raised:
        alone(tmp_path)
    assert len(str(raised.value)) < 600
    model = mote()
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "other")
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")  # as axolotl resumes
    with pytest.raises(ValueError, match=message):
        alone(tmp_path, adapter_name="my_lora_v1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_alpha": "8"}, "lora_alpha must be a valid integer; got '8'"),
        ({"steps": "analysis"}, "steps must be a valid array; got 'analysis'"),
        ({"layers_to_transform": {}}, "layers_to_transform must be a valid array or must be a valid integer; got {}"),
        (
            {"r": "x", "lora_dropout": "x"},
            "r must be a valid integer; got 'x'; lora_dropout must be a valid number; got",
        ),
        ({"r": -1}, "r must be greater than or equal to 1; got -1"),
        ({"r": 10**9}, "r must be at most 32, the larger side .*; got 1000000000"),
    ],
)
def test_wrong_values_are_refused_with_the_file(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    mote().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(ValueError, match=message) as refused:
        alone(tmp_path)
    if "at most" not in message:
        assert str(refused.value).startswith(f"{file}: ")


def test_a_value_of_any_type_in_any_field_is_taken_or_refused_with_the_field(tmp_path: Path) -> None:
    mote().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    sound = json.loads(file.read_text())
    values = [None, "x", 5, -1, 1.5, True, [], [1], [None], ["x"], {}, {"x": [1]}]
    for key in sound.keys() - {"peft_type"}:  # PEFT reads it first
        for value in values:
            file.write_text(json.dumps(sound | {key: value}))
            try:
                MoteConfig.from_pretrained(tmp_path)
            except ValueError as error:
                said = str(error)
                assert key in said.replace("task type", "task_type"), (key, value)


def test_tensors_of_the_base_do_not_come_in_with_an_adapter(tmp_path: Path) -> None:
    mote().save_pretrained(tmp_path)
    more = {"base_model.model.model.norm.weight": torch.zeros(32)}
    save_file(load_file(tmp_path / FILE) | more, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"must hold no tensors of its base model; got 1 \(.*model.norm"):
        alone(tmp_path)


def test_a_complete_state_is_loaded_whoever_asks() -> None:
    model, other = mote(), mote()
    change(other)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))
    trained = {name: p for name, p in other.named_parameters() if p.requires_grad}
    model.load_state_dict(trained, strict=False)
    base = {name: p for name, p in other.state_dict().items() if "lora_" not in name}
    model.load_state_dict(base, strict=False)
    plain = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    plain.load_state_dict({}, strict=False)  # no concern of ours
