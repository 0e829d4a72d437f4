"""The mixture of LoRA experts against a loop over tokens and experts; its balance loss and its gradient; its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kit
import pytest
import torch
from mixture import ADAPTER, Routers, balance_loss, gate, load_mixture
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

EXPERTS, R = 4, 2


def mixture(balance: float = 0.0, experts: int = EXPERTS) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=EXPERTS * R, lora_alpha=16, target_modules=kit.LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(kit.tiny_model(), config)
    Routers(model, experts, balance)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def layer_of(model: PeftModel) -> LoraLinear:
    return next(module for module in model.modules() if isinstance(module, LoraLinear))


@torch.no_grad()
def test_forward_equals_a_loop_over_tokens() -> None:
    layer = layer_of(mixture())
    x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(1))
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    expected = layer.base_layer(x).clone()
    chosen = set()
    for row in range(2):
        for column in range(7):
            token = x[row, column]
            scores = [float(w @ token) for w in layer.lora_router[ADAPTER].weight]
            best = sorted(range(EXPERTS), key=scores.__getitem__)[-2:]
            chosen.add(frozenset(best))
            exponentials = {e: torch.tensor(scores[e]).exp() for e in best}
            for e in best:
                block = slice(e * R, (e + 1) * R)
                weight = exponentials[e] / sum(exponentials.values())
                expected[row, column] += 2.0 * weight * (b[:, block] @ (a[block] @ token))  # lora_alpha / lora_r
    assert len(chosen) > 1, "the router must choose differently somewhere"
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_gate_keeps_two_and_adds_up_to_one() -> None:
    weights = gate(torch.randn(50, EXPERTS))
    assert ((weights > 0).sum(-1) == 2).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))


def test_balance_loss() -> None:
    everyone = torch.eye(EXPERTS).roll(1, 0) * 50 + torch.eye(EXPERTS) * 50  # each pair of neighbours once
    assert float(balance_loss(everyone[None])) == pytest.approx(1.0)
    collapsed = torch.tensor([[50.0, 50.0, 0.0, 0.0]]).expand(1, 6, 4)
    assert float(balance_loss(collapsed)) == pytest.approx(2.0)  # 4 * (0.5 * 0.5 + 0.5 * 0.5)
    padded = torch.cat([everyone[None], collapsed], dim=1)
    mask = torch.tensor([[1] * 4 + [0] * 6])
    assert float(balance_loss(padded, mask)) == pytest.approx(1.0)
    assert float(balance_loss(padded)) > 1.3


def loss_of(model: PeftModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(input_ids=ids, attention_mask=mask).logits.float().logsumexp(-1).mean()


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_reaches_the_gradient(masked: bool) -> None:
    """The gradient with the loss added on the way equals that of both losses added up."""
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4]) if masked else None
    model = mixture(balance=0.3).train()
    loss_of(model, ids, mask).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = mixture().train()
    losses: list[Tensor] = []
    layers = [module for module in plain.modules() if isinstance(module, LoraLinear)]
    for layer in layers:

        def note(module: Any, args: Any, output: Tensor, router: Any = layer.lora_router[ADAPTER]) -> None:
            losses.append(balance_loss(router(args[0].float()), mask))

        layer.lora_A[ADAPTER].register_forward_hook(note)
    (loss_of(plain, ids, mask) + 0.3 * sum(losses) / len(layers)).backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    assert any("lora_router" in name for name in got)
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_routers_are_trained_and_alike_for_one_seed() -> None:
    models = [mixture(), mixture()]
    weights = [layer_of(model).lora_router[ADAPTER].weight for model in models]
    assert all(weight.requires_grad for weight in weights)
    assert torch.equal(*weights)


def test_rank_must_be_even() -> None:
    with pytest.raises(ValueError, match=r"multiple of mixture\.experts, 3; got 8"):
        mixture(experts=3)


def saved(tmp_path: Path, model: PeftModel) -> Path:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    kit.tiny_model().save_pretrained(base)
    return kit.save_adapter(model, kit.tiny_tokenizer(), folder, base)


@torch.no_grad()
def test_folder_holds_the_routers(tmp_path: Path) -> None:
    model = mixture()
    ids = torch.randint(0, 250, (1, 12), generator=torch.Generator().manual_seed(3))
    loaded, _ = load_mixture(saved(tmp_path, model), device="cpu")
    torch.testing.assert_close(loaded(input_ids=ids).logits[..., :259], model(input_ids=ids).logits)


def test_a_plain_lora_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=kit.LINEARS, task_type="CAUSAL_LM")
    folder = saved(tmp_path, get_peft_model(kit.tiny_model(), config))
    with pytest.raises(ValueError, match="routers of a mixture; got none"):
        load_mixture(folder, device="cpu")
