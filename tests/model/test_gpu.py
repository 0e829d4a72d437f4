"""What only a GPU can show: the kernels' own backward passes, half precision, regional compilation with inductor.

`make gpu-check` runs these; elsewhere they are skipped. Each compares with float32 dense attention on the CPU.
"""

from __future__ import annotations

import pytest
import torch
from kit import STEPS, add_mote_adapter, base_model, chain, mote, mote_config, mote_model
from test_compile import packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(
    attention: str, device: str, dtype: torch.dtype, compiled: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss per token and gradients of one packed batch with dropped steps."""
    model = mote("llama", attention, question_routing="mean").to(device).train()
    mote_model(model).routing.step_dropout = (0.5,) * (len(STEPS) - 1)
    if compiled:
        for layer in model.get_base_model().get_decoder().layers:
            layer.compile()
    inputs = {name: tensor.to(device) for name, tensor in packed(3).items()}
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        losses = model(**inputs).loss
    losses.sum().backward()
    gradients = [p.grad.float().cpu() for p in model.parameters() if p.requires_grad]
    return losses.detach().float().cpu(), gradients


@pytest.mark.parametrize("compiled", [False, True])
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
    losses, gradients = run(attention, "cuda", dtype, compiled)
    exact_losses, exact_gradients = run("sdpa", "cpu", torch.float32)
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    assert (losses - exact_losses).norm() <= tolerance * exact_losses.norm()
    for found, exact in zip(gradients, exact_gradients, strict=True):
        assert (found - exact).norm() <= tolerance * 2 * exact.norm() + 1e-4


@torch.no_grad()
def test_an_adapter_on_a_model_that_is_on_the_gpu_already() -> None:
    base = base_model().cuda()
    model = add_mote_adapter(base, mote_config()).eval()
    ids = torch.tensor([chain()], device="cuda")
    assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4).shape[1] > ids.shape[1]


def test_no_host_synchronization_in_the_forward() -> None:
    """Reading a CUDA tensor on the CPU while the model runs would raise here."""
    model = mote("llama", "sdpa").cuda().train()
    mote_model(model).routing.step_dropout = (0.5, 0.5)
    inputs = {name: tensor.cuda() for name, tensor in packed(3).items()}
    model(**inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
