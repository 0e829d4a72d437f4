"""What MoTE is measured against: the forwards that the literature and axolotl use instead of one gated LoRA.

`MaskedLoras` and `TokenRouter` take the place of `MoteLinear` in a model that is otherwise MoTE's, weights included, so
that only the adapter's arithmetic differs. `axolotl_kernels` gives ONE plain LoRA model axolotl's fused kernels and
Liger's, without touching other models of the process. Nothing here measures.
"""

from __future__ import annotations

import tempfile
import types
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from axolotl_mote.model.adapter import MoteLinear, Routing, mote_model


def _experts(linear: MoteLinear, r: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Cut a gated LoRA of rank E * r into E ordinary ones: (R, D_in), (D_out, R) -> E x (r, D_in), E x (D_out, r)."""
    adapter = linear.active_adapters[0]
    lora_a, lora_b = linear.lora_A[adapter].weight.detach(), linear.lora_B[adapter].weight.detach()

    def layer(weight: Tensor) -> nn.Linear:
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        new.weight = nn.Parameter(weight.clone())
        return new

    return (
        nn.ModuleList(layer(part) for part in lora_a.split(r, dim=0)),
        nn.ModuleList(layer(part) for part in lora_b.split(r, dim=1)),
    )


class MaskedLoras(nn.Module):
    """The textbook forward: every expert runs on all tokens, and its output is multiplied by the step's mask.

    y = W x + sum_e mask_e[step_ids] * B_e(A_e x)
    """

    def __init__(self, linear: MoteLinear, routing: Routing) -> None:
        super().__init__()
        self.base_layer, self.routing, self.r = linear.base_layer, routing, routing.config.r
        self.lora_A, self.lora_B = _experts(linear, self.r)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D_out)."""
        result = self.base_layer(x)
        gate = cast(Tensor, self.routing.gate)
        for number, (lora_a, lora_b) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            mask = gate[..., number * self.r].unsqueeze(-1)  # (B, T, 1), weight and scaling included
            result = result + lora_b(lora_a(x)) * mask.to(result.dtype)
        return result


class TokenRouter(nn.Module):
    """A learned router: every token goes to the two of E LoRA experts that it scores highest (as MixLoRA's does).

    One router per linear layer, dispatch by gathering each expert's tokens, no balance loss. MixLoRA itself also runs
    the frozen down projection once per chosen expert; this does not, and is the cheaper for it.
    """

    def __init__(self, linear: MoteLinear, routing: Routing, top_k: int = 2) -> None:
        super().__init__()
        self.base_layer, self.top_k, self.scaling = linear.base_layer, top_k, routing.config.scaling
        self.lora_A, self.lora_B = _experts(linear, routing.config.r)
        weight = self.lora_A[0].weight
        self.router = nn.Linear(weight.shape[1], len(self.lora_A), bias=False, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D_out)."""
        result = self.base_layer(x)
        tokens = x.flatten(0, 1)  # (N, D)
        weights, chosen = F.softmax(self.router(tokens).float(), dim=-1).topk(self.top_k, dim=-1)
        weights = self.scaling * weights / weights.sum(-1, keepdim=True)
        update = torch.zeros_like(result).flatten(0, 1)
        for number, (lora_a, lora_b) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            token, slot = torch.where(chosen == number)
            output = lora_b(lora_a(tokens[token])) * weights[token, slot].unsqueeze(-1).to(result.dtype)
            update.index_add_(0, token, output)
        return result + update.view_as(result)


def replace_linears(model: PeftModel, kind: type[MaskedLoras] | type[TokenRouter]) -> PeftModel:
    """Put another multi-LoRA layer in place of every gated one, with the same weights."""
    tuner = mote_model(model)
    if tuner is None:
        raise ValueError("model must carry a MoTE adapter; got none. Use add_mote_adapter first.")
    gated = [(name, module) for name, module in model.named_modules() if isinstance(module, MoteLinear)]
    for name, module in gated:
        model.set_submodule(name, kind(module, tuner.routing))
    return model


def axolotl_kernels(model: PeftModel) -> PeftModel:
    """Give one plain LoRA model axolotl's fused kernels and Liger's RMSNorm and rotary embedding.

    axolotl rewrites the attention class for the whole process; here the rewritten forward is bound to this model's
    modules alone and the class is put back. The loss stays ours, as for every other variant.
    """
    from axolotl.monkeypatch import lora_kernels
    from axolotl.utils.dict import DictDefault
    from liger_kernel.transformers import apply_liger_kernel_to_llama, liger_rotary_pos_emb
    from transformers.models.llama import modeling_llama

    attention, norm = modeling_llama.LlamaAttention, modeling_llama.LlamaRMSNorm
    plain_forward = attention.forward
    causal: Any = model.get_base_model()
    with tempfile.TemporaryDirectory() as folder:
        causal.config.save_pretrained(folder)  # axolotl looks the architecture up in a folder
        keys = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel")
        cfg = DictDefault({"base_model": folder, **dict.fromkeys(keys, True)})
        lora_kernels.patch_self_attn_lora(cfg)
    fused_forward, attention.forward = attention.forward, plain_forward
    del attention._original_forward
    lora_kernels.apply_rotary_pos_emb = liger_rotary_pos_emb  # the rewritten forward lives in that module
    for module in causal.modules():
        if isinstance(module, attention):
            module.forward = types.MethodType(fused_forward, module)
    lora_kernels.apply_lora_kernel_patches(model, cfg)
    apply_liger_kernel_to_llama(rope=False, fused_linear_cross_entropy=False, swiglu=False, model=causal)
    modeling_llama.LlamaRMSNorm = norm
    return model
