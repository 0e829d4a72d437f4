"""Which layers get experts: tiny models of the families in which a named layer cannot have them."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import FAMILIES, MARKER_IDS, SIZE, VOCABULARY, base_model, chain, mote_config, randomize
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from axolotl_mote.export.folders import bake_markers
from axolotl_mote.model.adapter import PER_LAYER, MoteLinear, add_mote_adapter
from axolotl_mote.model.compat import text_decoder
from axolotl_mote.model.markers import MarkerHead, PerLayerEmbedding
from axolotl_mote.model.targets import choose_targets

_GEMMA = {**SIZE, "head_dim": 8, "query_pre_attn_scalar": 8}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_PER_LAYER_SIZE = 90  # fewer rows than the table of tokens
VALUES: dict[str, dict[str, Any]] = {
    "llama4_text": {**SIZE, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4},
    "mamba": {**SIZE, "state_size": 8},
    "gemma3_vision": {
        "text_config": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": VOCABULARY - 1,
    },
    "gpt_neox": SIZE,
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {**SIZE, "num_local_experts": 4},
    "gemma4_text": {
        **_GEMMA,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": _PER_LAYER_SIZE,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "falcon": {**SIZE, "new_decoder_architecture": False, "multi_query": True},
    "bart": {"vocab_size": VOCABULARY, "d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 48, "encoder_layers": 1}
    | {"decoder_attention_heads": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
}


@functools.cache
def _built(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if family.endswith("_vision") else AutoModelForCausalLM
    model = kind.from_config(CONFIG_MAPPING[family.removesuffix("_vision")](**VALUES[family]), dtype=torch.float32)
    return model.eval()


def tiny(family: str) -> PreTrainedModel:
    """A tiny random model; of the families of the kit, theirs."""
    return base_model(family) if family in FAMILIES else copy.deepcopy(_built(family))


def linear(model: PreTrainedModel, *also: str) -> PeftModel:
    """Experts where ``lora_target_linear: true`` asks for them: on the suffixes of all linear layers but the head."""
    head = model.get_output_embeddings()
    layers = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head]
    targets = sorted({name.rpartition(".")[2] for name in layers} | set(also))
    return add_mote_adapter(model, mote_config(target_modules=targets))


def adapted(model: nn.Module) -> set[str]:
    """Names of the layers with experts."""
    return {
        name.removeprefix("base_model.model.") for name, one in model.named_modules() if isinstance(one, MoteLinear)
    }


def suffixes(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name in adapted(model)}


def check_trains(model: PeftModel) -> None:
    """The loss runs, and every expert of every layer has a gradient."""
    row = chain()
    model.train()
    model(input_ids=torch.tensor([row]), targets=torch.tensor([[*row[1:], -100]])).loss.sum().backward()
    idle = [n for n, p in model.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.any())]
    assert not idle


# --- what is left out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_out_of_plain_decoders(family: str, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny(family)
    wanted = {n for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not base.get_output_embeddings()}
    model = linear(base)
    assert adapted(model) == wanted
    assert model.peft_config["default"].exclude_modules is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("family", "left_out", "reason"),
    [
        ("llama4_text", {"router"}, "router (2 layers; not linear: Llama4Router)"),
        ("mamba", {"dt_proj"}, "dt_proj (2 layers; no gradient reaches them)"),
        ("mamba", {"out_proj"}, "out_proj (2 layers; fused kernels read its weight alone)"),
        ("bart", {"encoder_attn"}, "k_proj, v_proj, q_proj, out_proj (4 layers; no gradient reaches them)"),
    ],
)
def test_layers_that_cannot_learn_are_left_out(
    family: str, left_out: set[str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = linear(tiny(family))
    assert not {part for name in adapted(model) for part in name.split(".")} & left_out
    (warning,) = [record.getMessage() for record in caplog.records if "get no experts:" in record.getMessage()][:1]
    assert reason in warning
    randomize(model)
    check_trains(model)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "fc1"], r".*\.(q_proj|fc1)"])
def test_vision_towers_are_left_out(targets: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = add_mote_adapter(tiny("gemma3_vision"), mote_config(target_modules=targets))
    assert "q_proj" in suffixes(model)
    assert not any("vision" in name or "multi_modal" in name for name in adapted(model))
    assert "lm_head" not in caplog.text  # nobody named it
    assert caplog.text.count("outside of the text decoder") == 1
    check_trains(model)


def test_a_head_is_no_target() -> None:
    base = tiny("gpt_neox")
    model = linear(base, "lm_head", "embed_out")  # axolotl knows the head by one of these names, by version
    assert suffixes(model) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    head = base.get_output_embeddings()
    assert isinstance(head, MarkerHead)
    assert type(head.base_layer) is nn.Linear


def test_own_kinds_of_linear_layers_keep_experts() -> None:
    base = tiny("falcon")
    assert type(base.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"
    assert {"query_key_value", "dense_h_to_4h"} <= suffixes(linear(base))


class _Dispatching(nn.Module):
    """Runs two of four experts, each on some of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.experts[0](x[:, :3]), self.experts[1](x[:, 3:])], dim=1)


def test_layers_on_other_tokens_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny("llama")
    base.model.layers[1].mlp = _Dispatching()
    assert not {name for name in adapted(linear(base)) if ".1.mlp." in name}
    assert "(4 layers; they run on other tokens)" in caplog.text


def test_a_base_that_cannot_run_is_named() -> None:
    base = tiny("llama")
    base.model.layers[1].mlp = nn.Linear(31, 32)
    with pytest.raises(ValueError, match=r"base_model must run forward and backward.*RuntimeError.*LlamaForCausalLM"):
        linear(base)
    assert not [one for one in base.modules() if one._forward_hooks]


class _Bypassing(nn.Module):
    """Calls its layer in evaluation alone, as AltUp of Gemma 3n does."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = nn.functional.linear(x, self.coefficients.weight) if self.training else self.coefficients(x)
        return out


def test_layers_that_training_bypasses_are_left_out() -> None:
    base = tiny("llama")
    base.model.layers[0].mlp = _Bypassing()
    assert "coefficients" not in suffixes(linear(base))


def test_the_look_at_a_model_leaves_no_trace() -> None:
    base, config = tiny("mamba"), mote_config(target_modules=["dt_proj", "x_proj"], exclude_modules=r".*\.0\..*")
    base.train()
    hooks = [len(one._forward_hooks) for one in base.modules()]
    state = torch.get_rng_state()
    with torch.no_grad():
        choose_targets(base, config, run=True)
    assert config.exclude_modules == r".*\.0\..*|(.*\.)?dt_proj"
    assert base.training
    assert [len(one._forward_hooks) for one in base.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in base.parameters())


def test_weights_of_two_types_run_as_training_runs_them() -> None:
    base = tiny("llama").to(torch.bfloat16)
    for name, module in base.named_modules():
        if name.endswith("norm"):
            module.float()  # axolotl and peft do so to some bases
    assert "q_proj" in suffixes(linear(base))


def test_partitioned_weights_are_judged_without_a_run() -> None:
    """As DeepSpeed ZeRO-3 leaves them while the model is loaded: empty, with their shape kept aside."""
    base, config = tiny("llama4_text"), mote_config(target_modules=["router", "q_proj"])
    for parameter in base.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    choose_targets(base, config, run=True)
    assert config.exclude_modules == {"router"}


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [[], ["c_attn", "c_proj"], "all-linear"])
def test_conv1d_is_refused_by_name(targets: Any) -> None:
    base = tiny("gpt2")
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(
        ValueError, match=r"GPT2LMHeadModel.*Conv1D, which cannot carry experts: use another base model"
    ):
        add_mote_adapter(base, mote_config(target_modules=targets))
    assert [name for name, _ in base.named_modules()] == before


def test_an_encoder_decoder_is_refused_by_name() -> None:
    base = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING["bart"](**VALUES["bart"]))
    with pytest.raises(ValueError, match=r"base_model must be a decoder-only model.*BartForConditionalGeneration"):
        add_mote_adapter(base, mote_config(target_modules=["q_proj"]))


# --- what is said of weights that are in no linear layer -----------------------------------------------------------


def test_fused_experts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny("mixtral")
    experts = sum(p.numel() for n, p in base.named_parameters() if "gate_up_proj" in n or "down_proj" in n)
    router = sum(p.numel() for n, p in base.named_parameters() if n.endswith("mlp.gate.weight"))
    total = sum(p.numel() for p in base.parameters())
    linear(base)
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"{100 * (experts + router) / total:.1f} % of the weights" in said
    assert "experts.gate_up_proj, experts.down_proj" in said


# --- saving, loading, exporting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama4_text", "gemma3_vision", "gemma4_text"])
def test_what_was_left_out_is_recorded(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = linear(tiny(family))
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    caplog.clear()
    loaded = PeftModel.from_pretrained(tiny(family), str(tmp_path)).eval()
    assert not caplog.records
    assert adapted(loaded) == adapted(model)
    ids = torch.tensor([chain()])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_ids_beyond_the_second_table_read_its_row_0() -> None:
    base = tiny("gemma4_text")
    table = copy.deepcopy(text_decoder(base).get_submodule(PER_LAYER))
    ids = torch.tensor([[5, VOCABULARY - 1, *MARKER_IDS]])
    model = randomize(linear(base))
    layer = getattr(text_decoder(base), PER_LAYER)
    assert isinstance(layer, PerLayerEmbedding)
    expected = table(ids.masked_fill(ids >= _PER_LAYER_SIZE, 0))
    assert torch.equal(layer(ids), expected)

    logits = base(input_ids=ids).logits
    for twin in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(twin(input_ids=ids).logits, logits)

    exported = tiny("gemma4_text")
    tensors = {name: p.detach() for name, p in base.named_parameters() if "lora_" in name}
    tensors = {name.replace(".default", ""): tensor for name, tensor in tensors.items()}
    bake_markers(exported, mote_config(), tensors)
    assert torch.equal(getattr(text_decoder(exported), PER_LAYER)(ids), expected)

    unloaded = model.unload()
    assert type(getattr(text_decoder(unloaded), PER_LAYER)) is type(table)
    assert unloaded is base


def test_layers_without_a_gradient_are_left_out_under_checkpointing_too() -> None:
    """Then there is no run in training mode that would show it."""
    model = base_model()
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda _module, _args, out: out.detach())
    model.gradient_checkpointing_enable()
    config = mote_config(target_modules=["q_proj", "k_proj"])
    choose_targets(model, config, run=True)
    assert config.exclude_modules == {"k_proj"}
