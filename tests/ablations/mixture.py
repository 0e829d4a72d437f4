"""A token-level mixture of LoRA experts, the baseline with a learned router: an axolotl plugin for `adapter: lora`.

    y = W x + s * sum_e g_e(x) B_e A_e x,    g(x) = the two largest of softmax(R x), scaled to add up to 1

The experts are the rank blocks of ONE plain LoRA, so one forward computes all of them and the router's weights gate the
rank dimension; every linear layer has a router of its own. A balance loss keeps the experts equally busy (that of the
Switch Transformer, over the top two). The routers are saved in the adapter folder beside the LoRA's tensors;
``load_mixture`` reads them, ``load_mote`` alone would not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file
from torch import Tensor, nn

from axolotl_mote.generation.loading import load_mote

TOP_K = 2
ADAPTER = "default"
ROUTER = ".lora_router.weight"


class MixtureOptions(BaseModel):
    """The `mixture:` block."""

    model_config = ConfigDict(extra="forbid")

    experts: int = Field(default=4, ge=TOP_K, description="Experts; lora_r is the rank of all of them together.")
    balance: float = Field(default=0.01, ge=0.0, description="Weight of the balance loss, a mean over the routers.")


class MixtureArgs(BaseModel):
    """What the plugin adds to axolotl's schema."""

    mixture: MixtureOptions | None = None


class _AddLoss(torch.autograd.Function):
    """Passes a tensor on and adds a further loss to whatever is minimized, so that no trainer has to know it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones_like(ctx.like)


def gate(logits: Tensor) -> Tensor:
    """Weights of the experts, (..., E) -> (..., E): softmax, the top two kept and scaled to add up to 1."""
    probabilities = logits.softmax(-1)
    weights, chosen = probabilities.topk(TOP_K, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))


def balance_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e: f_e the share of choices that fall on expert e, P_e its mean probability; 1 when balanced.

    Args:
        logits: The router's, (B, T, E).
        mask: 1 for the tokens that count, (B, T); None: all.
    """
    count = logits.shape[-1]
    probabilities = logits.softmax(-1).flatten(0, -2)
    chosen = F.one_hot(probabilities.topk(TOP_K, dim=-1).indices, count).sum(-2).to(probabilities.dtype)
    tokens = torch.ones(len(probabilities), device=logits.device) if mask is None else mask.flatten()
    tokens = tokens.to(probabilities.dtype).unsqueeze(-1)
    shares = (chosen * tokens).sum(0) / (TOP_K * tokens.sum())
    means = (probabilities * tokens).sum(0) / tokens.sum()
    return count * (shares.detach() * means).sum()


class Routers:
    """The routers of a model, one beside each of its LoRA layers, and how they act.

    Args:
        model: A PeftModel with a plain LoRA whose rank is a multiple of ``experts``.
        experts: Number of experts.
        balance: Weight of the balance loss while training.
        seed: Of the routers' first values.

    Raises:
        ValueError: If the rank cannot be split evenly.
    """

    def __init__(self, model: PeftModel, experts: int, balance: float = 0.0, seed: int = 0) -> None:
        self.balance, self.mask = balance, None
        layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            lora_a = layer.lora_A[ADAPTER]
            if lora_a.out_features % experts:
                raise ValueError(
                    f"lora_r must be a multiple of mixture.experts, {experts}; got {lora_a.out_features}. Change one."
                )
            router = nn.Linear(lora_a.in_features, experts, bias=False)  # float32 whatever the model's dtype
            with torch.no_grad():
                router.weight.normal_(std=0.02, generator=generator)
            layer.lora_router = nn.ModuleDict({ADAPTER: router.to(lora_a.weight.device)})
            lora_a.register_forward_hook(self._hook(layer.lora_router[ADAPTER], lora_a.out_features // experts))
        self.count = len(layers)
        model.register_forward_pre_hook(self._note_mask, with_kwargs=True)

    def _note_mask(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _hook(self, router: nn.Module, r: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            with torch.autocast(output.device.type, enabled=False):
                logits = router(args[0].float())
                columns = gate(logits).repeat_interleave(r, dim=-1)
                if module.training and self.balance and torch.is_grad_enabled():
                    loss = balance_loss(logits, self.mask) * (self.balance / self.count)
                    columns = _AddLoss.apply(columns, loss)
            return output * columns.to(output.dtype)

        return hook


def load_mixture(folder: str | Path, **options: Any) -> tuple[PeftModel, Any]:
    """The trained mixture of a folder, ready for ``generate_chain``; options are those of ``load_mote``.

    Raises:
        ValueError: If the folder holds no router for a layer.
    """
    model, tokenizer = load_mote(folder, **options)
    found = {
        name.removesuffix(ROUTER): tensor
        for name, tensor in load_file(Path(folder) / "adapter_model.safetensors").items()
        if name.endswith(ROUTER)
    }
    if not found:
        raise ValueError(f"adapter must hold the routers of a mixture; got none at {folder}. Train with the plugin.")
    Routers(model, next(iter(found.values())).shape[0])
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            if name not in found:
                raise ValueError(f"adapter must hold a router for {name}; got none at {folder}. Train it again.")
            with torch.no_grad():
                module.lora_router[ADAPTER].weight.copy_(found[name])
    return model.eval(), tokenizer
