"""How a hidden step reaches the model's attention: one rendering of the visibility rule per back end.

The rendering goes in as the model's own ``attention_mask``, which transformers uses as it is. What would ignore it is
refused. This module knows transformers' configurations and nothing of adapters or training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from axolotl_mote.masks import Visibility, dense_mask, flex_mask

DENSE = ("sdpa", "eager")
FLEX = ("flex_attention",)


def layer_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """Sliding window of each kind of attention layer; the key "" means that all layers are of one kind.

    Raises:
        NotImplementedError: If a layer is neither full nor sliding attention.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {"": window}
    windows = {"full_attention": None, "sliding_attention": window}
    for kind in set(kinds):
        if kind not in windows:
            raise NotImplementedError(
                f"mote.step_dropout must meet full or sliding attention layers only; got {kind!r} in "
                f"{config.model_type}. Set mote.step_dropout: 0."
            )
    return {kind: windows[kind] for kind in sorted(set(kinds))}


def check_attention(config: PretrainedConfig) -> None:
    """Refuse an attention implementation that would ignore the mask.

    Raises:
        ValueError: If the implementation has no rendering.
    """
    implementation = config.get_text_config()._attn_implementation
    if implementation not in DENSE + FLEX:
        raise ValueError(
            f"mote.step_dropout must run on one of {DENSE + FLEX}; got attn_implementation {implementation!r}, "
            "which would ignore the mask. Set attn_implementation: flex_attention, or mote.step_dropout: 0."
        )


def render(visibility: Visibility, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """Render the rule for the model's attention implementation.

    Args:
        visibility: What decides who sees whom.
        config: The model's configuration; gives the implementation and the windows.
        dtype: Dtype of the attention scores, for the additive mask of eager attention.

    Returns:
        A mask, or a dict of masks by layer type for models that mix window sizes.
    """
    check_attention(config)
    implementation = config.get_text_config()._attn_implementation

    def one(window: int | None) -> Any:
        if implementation in FLEX:
            return flex_mask(visibility, window)
        mask = dense_mask(visibility, window)
        return _additive(mask, dtype) if implementation == "eager" else mask

    masks = {kind: one(window) for kind, window in layer_windows(config).items()}
    return masks[""] if "" in masks else masks


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, the dtype's minimum elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
