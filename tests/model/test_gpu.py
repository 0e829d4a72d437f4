"""What only a GPU can show: the kernels' own backward passes, half precision, regional compilation with inductor.

`make gpu-check` runs these, `make gpu-session` too; elsewhere they are skipped. MOTE_GPU_TESTS=cpu runs on the CPU what
can run there, so that the tests themselves are tested. Losses and gradients are compared with float32 dense attention
on the CPU.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from kit import STEPS, add_mote_adapter, base_model, chain, mote, mote_config, mote_model
from test_compile import packed
from torch import Tensor

from axolotl_mote.model.compiling import compile_layers
from axolotl_mote.model.masks import Visibility, build_block_mask, build_dense_mask

DEVICE = os.environ.get("MOTE_GPU_TESTS", "cuda")
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"
NO_BACKWARD = "flex_attention has no backward on the CPU"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def routed(attention: str, device: str, compiled: bool = False) -> Any:
    """A tiny model in training mode that drops steps."""
    model = mote("llama", attention, question_routing="mean").to(device).train()
    mote_model(model).routing.step_dropout = (0.5,) * (len(STEPS) - 1)
    if compiled:
        compile_layers(model.get_base_model(), backend=BACKEND, on_fallback=pytest.fail)
    return model


def packed_on(device: str, seed: int, length: int = 128) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in packed(seed, length).items()}


def gradients_of(model: Any) -> list[Tensor]:
    return [p.grad.float().cpu() for p in model.parameters() if p.requires_grad]


def run(attention: str, device: str, dtype: torch.dtype, compiled: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Loss per token and gradients of one packed batch with dropped steps."""
    model = routed(attention, device, compiled)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        losses = model(**packed_on(device, 3)).loss
    losses.sum().backward()
    return losses.detach().float().cpu(), gradients_of(model)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        ("sdpa", torch.float32),
        ("flex_attention", torch.float32),
        ("flex_attention", torch.bfloat16),
        ("mote_varlen", torch.bfloat16),
        ("flash_attention_2", torch.bfloat16),
    ],
)
def test_loss_and_gradients_equal_float32_dense(attention: str, dtype: torch.dtype, compiled: bool) -> None:
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    if attention == "flex_attention" and DEVICE == "cpu":
        pytest.skip(NO_BACKWARD)
    torch._dynamo.reset()
    losses, gradients = run(attention, DEVICE, dtype, compiled)
    exact_losses, exact_gradients = run("sdpa", "cpu", torch.float32)
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    assert (losses - exact_losses).norm() <= tolerance * exact_losses.norm()
    for found, exact in zip(gradients, exact_gradients, strict=True):
        assert (found - exact).norm() <= tolerance * 2 * exact.norm() + 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_batches_of_many_lengths_take_few_graphs(attention: str) -> None:
    """One of torch's own counters, so that inductor itself compiles; none may be compiled once lengths have varied."""
    if attention == "flex_attention" and DEVICE == "cpu":
        pytest.skip(NO_BACKWARD)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    model = routed(attention, DEVICE, compiled=True)

    def step(number: int, length: int) -> None:
        mote_model(model).routing.step = number
        model(**packed_on(DEVICE, number, length)).loss.sum().backward()

    before = graphs["unique_graphs"]
    for number, length in enumerate((256, 192)):
        step(number, length)
    warm = graphs["unique_graphs"]
    assert before < warm
    for number, length in enumerate((320, 128, 200, 256, 384), start=2):
        step(number, length)
    assert graphs["unique_graphs"] == warm


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", "mote_varlen"])
def test_a_backward_in_another_thread_with_checkpointing(attention: str) -> None:
    """Two forwards in one thread, their backward passes in another, with layers that run again: as without."""
    if attention == "flex_attention" and DEVICE == "cpu":
        pytest.skip(NO_BACKWARD)

    def gradients(checkpointing: bool) -> list[Tensor]:
        model = routed(attention, DEVICE)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=attention == "mote_varlen"):
            losses = [model(**packed_on(DEVICE, seed)).loss.sum() for seed in (3, 4)]
        thread = threading.Thread(target=lambda: [loss.backward() for loss in losses])
        thread.start()
        thread.join(timeout=120)
        assert not thread.is_alive()
        return gradients_of(model)

    tolerance = 2e-2 if attention == "mote_varlen" else 1e-3
    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm() + 1e-4


@pytest.mark.parametrize("length", [256, 300])
def test_the_block_mask_covers_what_is_visible(length: int) -> None:
    """The blocks of the BlockMask, compiled on CUDA, against the dense mask: exactly those with a visible pair."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 4, (2, length), generator=generator).sort(1).values
    visibility = Visibility(
        torch.zeros_like(steps),
        steps,
        (steps == 1) | (steps == 2) & (torch.arange(2) == 1).unsqueeze(1),
        torch.arange(length).expand(2, -1),
        torch.ones_like(steps, dtype=torch.bool),
    )
    visible = build_dense_mask(visibility).expand(-1, 1, -1, -1)
    moved = Visibility(*(tensor.to(DEVICE) for tensor in vars(visibility).values()))
    mask = build_block_mask(moved)
    size = mask.BLOCK_SIZE[0]
    blocks = -(-length // size)
    pad = blocks * size - length
    tiles = torch.nn.functional.pad(visible, (0, pad, 0, pad)).unflatten(2, (blocks, size)).unflatten(4, (blocks, size))
    any_visible = tiles.any(5).any(3).expand(-1, 1, -1, -1)
    assert torch.equal(mask.to_dense().cpu().bool(), any_visible)


@torch.no_grad()
def test_an_adapter_on_a_model_that_is_on_the_gpu_already() -> None:
    base = base_model().to(DEVICE)
    model = add_mote_adapter(base, mote_config()).eval()
    ids = torch.tensor([chain()], device=DEVICE)
    options = {"max_new_tokens": 4, "eos_token_id": None}
    assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).shape[1] == ids.shape[1] + 4


@pytest.mark.skipif(DEVICE == "cpu", reason="only CUDA reports synchronization")
def test_no_host_synchronization_in_the_forward() -> None:
    """Reading a CUDA tensor on the CPU while the model runs would raise here."""
    model = mote("llama", "sdpa").cuda().train()
    mote_model(model).routing.step_dropout = (0.5, 0.5)
    inputs = packed_on("cuda", 3)
    model(**inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
