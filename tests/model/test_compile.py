"""Compiling each decoder layer changes no result and compiles once for all layers and all batches."""

from __future__ import annotations

import pytest
import torch
from kit import chain, mote, mote_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend


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
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, plain = (mote("llama", attention).train() for _ in range(2))
    for model in (compiled, plain):
        mote_model(model).routing.step_dropout = (0.5, 0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    for layer in compiled.get_base_model().get_decoder().layers:
        layer.compile(backend=counter)
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
    for layer in model.get_base_model().get_decoder().layers:
        layer.compile(backend=counter)
    for length in (96, 77, 110, 64, 123, 90):
        model(**packed(1, length))
    assert counter.frame_count <= 2
