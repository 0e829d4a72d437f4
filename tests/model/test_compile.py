"""Compiling each decoder layer changes no result and compiles once for all layers and all batches."""

from __future__ import annotations

import pytest
import torch
from kit import chain, mote, mote_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from axolotl_mote.model.compiling import compile_layers


def packed(seed: int, length: int = 128) -> dict[str, Tensor]:
    """A packed row of a fixed length whose documents and steps differ with the seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = [chain(*torch.randint(2, 8, (4,), generator=generator).tolist(), seed=9 * seed + i) for i in range(8)]
    ids = [token for row in rows for token in row][:length]
    positions = [position for row in rows for position in range(len(row))][:length]
    ids, positions = ids + [0] * (length - len(ids)), positions + list(range(length - len(positions)))
    tokens = torch.tensor([ids])
    return {"input_ids": tokens, "position_ids": torch.tensor([positions]), "targets": tokens.roll(-1, 1)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("attention", "frames"), [("sdpa", 1), ("mote_varlen", 4)])
def test_batches_of_different_content_share_one_compilation(attention: str, frames: int, checkpointing: bool) -> None:
    """mote_varlen leaves the graph at the attention, hence its pieces; none of them is compiled again."""
    if checkpointing and attention == "mote_varlen" and "__call__" not in vars(GradientCheckpointingLayer):
        frames = 0  # transformers 5.23 has the checkpoint inside the graph, where torch compiles nothing that leaves it
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, plain = (mote("llama", attention).train() for _ in range(2))
    for model in (compiled, plain):
        mote_model(model).routing.step_dropout = (0.5, 0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    compile_layers(compiled.get_base_model(), backend=counter, on_fallback=pytest.fail)
    for seed in range(5):
        losses = []
        for model in (compiled, plain):
            mote_model(model).routing.step = seed
            loss = model(**packed(seed)).loss.sum()
            loss.backward()
            losses.append(loss.detach())
        assert torch.allclose(*losses, rtol=1e-5)
    assert counter.frame_count == frames
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_lengths_that_vary_cost_one_more_compilation() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = mote("llama").train()
    mote_model(model).routing.step_dropout = (0.5, 0.5)
    compile_layers(model.get_base_model(), backend=counter, on_fallback=pytest.fail)
    for length in (96, 77, 110, 64, 123, 90):
        model(**packed(1, length))
    assert counter.frame_count <= 2


def batch(rows: int, length: int, packing: bool, seed: int) -> dict[str, Tensor]:
    """Rows of whole chains: packed into one row, or one padded chain per row."""
    if packing:
        return packed(seed, length)
    chains = [chain(5, 4, 3 * (row % 2), length // 3, seed=seed + row)[:length] for row in range(rows)]
    ids = torch.tensor([one + [0] * (length - len(one)) for one in chains])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "targets": ids.roll(-1, 1)}


# (training, rows, length): as unpacked data, an evaluation with larger batches, and last batches come.
SEQUENCE = [
    (True, 2, 64),
    (True, 2, 48),
    (False, 2, 70),
    (False, 4, 64),
    (True, 1, 33),
    (False, 1, 31),
]


@pytest.mark.parametrize(
    ("family", "attention", "kinds", "packing"),
    [("llama", "sdpa", 1, False), ("gemma2", "flex_attention", 2, False), ("gemma2", "flex_attention", 2, True)],
)
def test_any_batches_take_few_compilations(
    family: str, attention: str, kinds: int, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and evaluation, one row and several: a graph each, for each kind of layer; none runs uncompiled."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # the CPU as a device that can train
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = mote(family, attention)
    mote_model(model).routing.step_dropout = (0.5, 0.5)
    compile_layers(model.get_base_model(), backend=counter, on_fallback=pytest.fail)
    for seed, (training, rows, length) in enumerate(SEQUENCE):
        model.train(training)
        with torch.set_grad_enabled(training):
            losses = model(**batch(rows, length, packing, seed)).loss
        if training:
            losses.sum().backward()
    assert counter.frame_count <= kinds * (2 if packing else 4)


@torch.no_grad()
def test_a_limit_that_is_reached_is_reported() -> None:
    torch._dynamo.reset()
    reports: list[str] = []
    model = mote("llama").train()
    compile_layers(model.get_base_model(), backend="eager", on_fallback=reports.append)
    with torch._dynamo.config.patch(recompile_limit=1):
        for rows in (1, 2):
            model(**batch(rows, 40, False, 0))
    assert reports
    assert "recompile_limit" in reports[0]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_whole_model_compiles_too(family: str) -> None:
    """As ``generate`` does it with a static cache on CUDA."""
    torch._dynamo.reset()
    model = mote(family)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for seed in (0, 1):
        ids = torch.tensor([chain(seed=seed)])
        assert torch.allclose(compiled(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)


@pytest.mark.parametrize(("family", "count"), [("bloom", 2), ("gpt_neox", 2), ("gemma3_text", 2)])
def test_layers_are_found_whatever_a_family_calls_them(
    family: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    config = CONFIG_MAPPING[family](vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    compile_layers(AutoModelForCausalLM.from_config(config), on_fallback=pytest.fail)
    assert len(compiled) == count
