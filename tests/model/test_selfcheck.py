"""The self-check passes on every family that is right, and names what is wrong on one that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import FAMILIES, base_model, mote
from peft import PeftModel
from torch import Tensor
from transformers import CONFIG_MAPPING

from axolotl_mote.model import adapter, routed
from axolotl_mote.model.loss import token_losses
from axolotl_mote.model.selfcheck import SelfCheckError, check_generation, check_training


def dropping(family: str = "llama", **kwargs: Any) -> PeftModel:
    model = mote(family, **kwargs)
    model.base_model.routing.step_dropout = (0.5, 0.0)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_that_are_right_pass(family: str, dtype: torch.dtype) -> None:
    model = dropping(family, question_routing="random").to(dtype)
    check_training(model)
    check_generation(model)


def test_a_check_leaves_everything_as_it_was() -> None:
    model = dropping(question_routing="random").train()
    model.get_decoder().layers[0].eval()  # one that a user has frozen
    routing = model.base_model.routing
    modes = {name: module.training for name, module in model.named_modules()}
    before, config, state = vars(routing) | {"segments": None}, routing.config, torch.get_rng_state()
    check_training(model)
    check_generation(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert vars(routing) == before
    assert routing.config is config
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_runs_after_a_forward_of_the_base_alone() -> None:
    model = dropping()
    with model.disable_adapter():
        model(input_ids=torch.arange(3, 9).unsqueeze(0))
    check_training(model)
    check_generation(model)
    assert model.base_model.routing.config.steps == ["analysis", "guidance", "response"]


# --- faults ---------------------------------------------------------------------------------------------------------


def wrong_logits(monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    def guessed(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *args: Any) -> Tensor:
        return token_losses(hidden, targets, lambda rows: 1.5 * head(rows), *args)

    monkeypatch.setattr(adapter, "token_losses", guessed)
    return dropping()


def ignored_mask(monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    monkeypatch.setattr(routed, "build_attention_mask", lambda *_: None)
    return dropping()


def ignored_positions(monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    monkeypatch.setattr(routed, "positions_without_dropped", lambda ids, *_: torch.arange(ids.shape[1]).expand_as(ids))
    return dropping()


def a_model_that_looks_ahead(monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    model = dropping()
    decoder = model.get_decoder()
    decoder.register_forward_hook(
        lambda _, __, output: output.__setitem__("last_hidden_state", output.last_hidden_state.flip(1))
    )
    return model


def an_attention_of_its_own(monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    config = CONFIG_MAPPING["gpt_neo"](
        vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    config.window_size = 4
    monkeypatch.setitem(FAMILIES, "gpt_neo", config)
    return dropping("gpt_neo", attention="eager", target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (wrong_logits, r"loss must be exact on the base model; the self-check of LlamaForCausalLM got a mean"),
        (ignored_mask, r"step dropout must be exact.* Set mote.step_dropout: 0"),
        (ignored_positions, r"step dropout must be exact.* Set mote.step_dropout: 0"),
        (a_model_that_looks_ahead, r"causality must be exact"),
        (an_attention_of_its_own, r"step dropout must be exact on the base model; the self-check of GPTNeoForCausalLM"),
    ],
)
def test_a_fault_of_training_is_named(
    fault: Callable[[pytest.MonkeyPatch], PeftModel], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fault(monkeypatch)
    with pytest.raises(SelfCheckError, match=message):
        check_training(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bidirectional_attention_is_seen_in_any_precision(dtype: torch.dtype) -> None:
    model = dropping(attention="eager").to(dtype)

    def without_mask(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": None}

    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_pre_hook(without_mask, with_kwargs=True)
    with pytest.raises(SelfCheckError, match="causality must be exact"):
        check_training(model)


def test_only_dropped_steps_need_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ignored_mask(monkeypatch)
    model.base_model.routing.step_dropout = (0.0, 0.0)
    check_training(model)


@pytest.mark.parametrize("change", [lambda ids: ids.roll(1, -1), lambda ids: ids[:, :0]])
def test_a_fault_of_generation_is_named(change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong steps give other logits; steps of the wrong shape an error, which is told too."""
    model = mote()
    model.base_model.model.generation_config.num_beams = 3  # what a base asks for when it generates is not checked
    original = type(model.base_model.model).prepare_inputs_for_generation

    def misrouted(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = original(self, *args, **kwargs)
        if "step_ids" in inputs:  # not while the base model runs alone
            inputs["step_ids"] = change((inputs["step_ids"] + 1) % 4)
        return inputs

    monkeypatch.setattr(type(model.base_model.model), "prepare_inputs_for_generation", misrouted)
    with pytest.raises(SelfCheckError, match="generation with a cache must be exact"):
        check_generation(model)


def test_what_the_base_model_itself_gets_wrong_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mote()
    layer = model.get_decoder().layers[0].self_attn
    layer.register_forward_hook(lambda _, __, output: (output[0] * output[0].shape[1], *output[1:]))
    with pytest.warns(UserWarning, match="The base model alone is off as well"):
        check_generation(model)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="must have a MoTE adapter; got LlamaForCausalLM"):
        check_training(base_model())
