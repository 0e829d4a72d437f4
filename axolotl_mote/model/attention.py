"""Step dropout in the model's own attention: the visibility rule in the form that each implementation takes.

Dense masks and BlockMasks are passed as the model's ``attention_mask``, which transformers uses unchanged. Flash
attention takes no mask, so its functions are intercepted: a module whose ``mote_holder`` has segments attends segment
by segment, every other module as before. An implementation that would ignore the rule raises an error. No adapters, no
training.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from axolotl_mote.model.compat import (
    FLASH_ATTN_KERNEL_FALLBACK,
    attention_implementation,
    carries_state,
    decoder_layers,
    find_attention_modules,
    flash_attention_forward,
    get_target_dtype,
    intercept_attention,
    text_decoder,
)
from axolotl_mote.model.masks import Segments, Visibility, build_block_mask, build_dense_mask, build_segments

DENSE = ("sdpa", "eager")
FLEX = ("flex_attention",)
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4", *FLASH_ATTN_KERNEL_FALLBACK.values())
"""flash-attn itself, and the hub kernels that transformers uses where it is not installed."""
VARLEN = "mote_varlen"
"""Our own implementation: torch's varlen_attn on CUDA, a loop over segments elsewhere; sdpa without dropped steps."""


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
    for kind in sorted(set(kinds)):  # always the same one is named
        if kind not in windows:
            raise NotImplementedError(
                f"mote.step_dropout must run on layers with full or sliding attention; got {kind!r} in "
                f"{config.model_type}. Set mote.step_dropout: 0."
            )
    return {kind: windows[kind] for kind in sorted(set(kinds))}


def prepare_attention(model: PreTrainedModel) -> None:
    """Check that a model's attention respects dropped steps; make its flash kernel, if any, take segments.

    Raises:
        ValueError: If the attention implementation would ignore the rule.
        NotImplementedError: If a layer does not attend, or is of an unknown kind.
    """
    check_attention(model.config)
    decoder = text_decoder(model)
    reason = None
    if carries_state(model):
        reason = "carries a state that no mask reaches"
    elif "position_ids" not in inspect.signature(decoder.forward).parameters:
        reason = "takes no position_ids: positions could not follow what a token sees"
    elif not all(any(find_attention_modules(layer)) for layer in decoder_layers(decoder)):
        reason = "has layers with an attention of their own, or none"
    if reason is not None:
        raise NotImplementedError(
            "mote.step_dropout must run on models whose layers attend through transformers' attention interface; got "
            f"{type(model).__name__}, which {reason}. Set mote.step_dropout: 0."
        )
    name = attention_implementation(model.config)
    attending = find_attention_modules(decoder)
    names = {
        attention_implementation(cast(PretrainedConfig, module.config))
        for module in attending
        if hasattr(module, "config")
    }
    if names - {name}:
        raise ValueError(
            f"mote.step_dropout must run on one attention implementation; got {sorted(names | {name})} in one model. "
            "Set attn_implementation: flex_attention, or mote.step_dropout: 0."
        )
    if name in FLASH:  # hub kernels are registered while the model is loaded
        intercept_attention(name, _flash_segmented)


def check_attention(config: PretrainedConfig) -> None:
    """Check that no layer of a model would ignore the rule.

    Raises:
        ValueError: If the attention implementation would.
        NotImplementedError: If a layer is of an unknown kind.
    """
    implementation = attention_implementation(config)
    known = (*DENSE, *FLEX, *FLASH, VARLEN)
    if implementation not in known:
        raise ValueError(
            f"mote.step_dropout must run on one of {known}; got attn_implementation {implementation!r}, which would "
            "ignore the mask. Set attn_implementation: flex_attention, or mote.step_dropout: 0."
        )
    layer_windows(config)


def build_attention_mask(visibility: Visibility, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The visibility rule in the form that the model's attention implementation takes.

    Args:
        visibility: The tensors that decide which token sees which.
        config: The model's configuration; gives the implementation and the windows.
        dtype: Dtype of the attention scores, for the additive mask of eager attention.

    Returns:
        A mask, a dict of masks by layer type for models that mix windows, or Segments for flash attention.
    """
    check_attention(config)
    implementation = attention_implementation(config)
    if implementation in (*FLASH, VARLEN):
        return build_segments(visibility)

    def build(window: int | None) -> Any:
        if implementation in FLEX:
            return build_block_mask(visibility, window)
        mask = build_dense_mask(visibility, window)
        return _additive(mask, dtype) if implementation == "eager" else mask

    masks = {kind: build(window) for kind, window in layer_windows(config).items()}
    return masks.get("", masks)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, the dtype's minimum elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


# --- variable-length attention --------------------------------------------------------------------------------------


class SegmentsHolder:
    """Where the attention modules of one model read the segments of the current forward; None means full attention."""

    segments: Segments | None = None


def attach(model: nn.Module, holder: SegmentsHolder) -> None:
    """Give every attention module of a model a reference to the holder."""
    for module in find_attention_modules(model):
        module.mote_holder = holder  # type: ignore[assignment]


def detach(model: nn.Module) -> None:
    """Take the references back."""
    for module in find_attention_modules(model):
        if hasattr(module, "mote_holder"):
            del module.mote_holder


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor:
    """Attention of each segment's queries to its keys, causal and aligned to the last of both.

    torch's varlen_attn on CUDA; elsewhere a loop over SDPA with the same result, for tests.

    Args:
        query: Gathered queries, shape (Q, H, D).
        key: Gathered keys, shape (K, H_kv, D).
        value: Gathered values, shape (K, H_kv, D).
        segments: The offsets.
        scale: Factor on the scores.
        window: Sliding window in tokens, itself included; None means none.

    Returns:
        Output, shape (Q, H, D).
    """
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            query,
            key,
            value,
            segments.query_starts,
            segments.key_starts,
            segments.max_queries,
            segments.max_keys,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return cast(Tensor, out)
    outputs = []
    query_lengths, key_lengths = segments.query_starts.diff().tolist(), segments.key_starts.diff().tolist()
    for q, k, v in zip(
        torch.split(query, query_lengths), torch.split(key, key_lengths), torch.split(value, key_lengths), strict=True
    ):
        q_index = torch.arange(len(k) - len(q), len(k), device=q.device).unsqueeze(1)
        distance = q_index - torch.arange(len(k), device=q.device)
        mask = (distance >= 0) & (distance < (window or len(k)))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, H, L, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@torch.compiler.disable  # the segments' lengths are data; tracing them would compile anew for every batch
def _by_segment(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    flash: bool,
    kwargs: dict[str, Any],
) -> Tensor:
    """Gather, attend segment by segment, put back: (B, H, T, D) -> (B, T, H, D)."""
    batch, _, length, width = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * T, H, D)
    q, k, v = q[segments.queries], k[segments.keys], v[segments.keys]
    config = cast(PretrainedConfig, module.config)
    dtype = get_target_dtype(q, module)  # the kernels take neither float32 nor autocast
    scale = kwargs.get("scaling")
    window = kwargs.get("sliding_window")
    softcap = kwargs.get("softcap")
    sinks = kwargs.get("s_aux")
    if flash:
        out = flash_attention_forward(
            q.unsqueeze(0),
            k.unsqueeze(0),
            v.unsqueeze(0),
            None,
            query_length=q.shape[0],
            is_causal=True,
            dropout=kwargs.get("dropout", 0.0),
            softmax_scale=scale,
            sliding_window=window,
            softcap=softcap,
            cu_seq_lens_q=segments.query_starts,
            cu_seq_lens_k=segments.key_starts,
            max_length_q=segments.max_queries,
            max_length_k=segments.max_keys,
            target_dtype=dtype,
            attn_implementation=attention_implementation(config),
            s_aux=None if sinks is None else sinks.to(q.dtype),
        )[0]
    else:
        if softcap is not None or sinks is not None:
            raise NotImplementedError(
                f"attn_implementation {VARLEN!r} must run without soft-capped attention and attention sinks; got "
                f"softcap {softcap}{'' if sinks is None else ' and sinks'}. Use flex_attention or flash attention."
            )
        if q.is_cuda and dtype is not None:
            q, k, v = (x.to(dtype) for x in (q, k, v))
        out = segment_attention(q, k, v, segments, width**-0.5 if scale is None else scale, window)
    result: Tensor = out[segments.inverse].unflatten(0, (batch, length))
    return result


def _segmented(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, flash: bool, **kwargs: Any
) -> Tensor | None:
    """The output of a forward that has segments, (B, H, T, D) -> (B, T, H, D); None for any other."""
    holder = getattr(module, "mote_holder", None)
    if holder is None or holder.segments is None:
        return None
    output: Tensor = _by_segment(module, query, key, value, holder.segments, flash, kwargs)
    return output


_flash_segmented = functools.partial(_segmented, flash=True)

for _name in FLASH:
    intercept_attention(_name, _flash_segmented)
intercept_attention(VARLEN, functools.partial(_segmented, flash=False), like="sdpa")
