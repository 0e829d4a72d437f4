"""The base model: what axolotl does for adapters that it knows by name, done for `adapter: mote`.

Quantization, the attention implementation, compilation; no hooks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from axolotl_mote.training.compat import uses_fsdp

LOG = logging.getLogger("axolotl.mote")  # below axolotl's logger, so that its handlers print it


def quantize_through_model_kwargs(cfg: dict[str, Any]) -> None:
    """Have transformers load a base in 4 or 8 bits; axolotl asks it to for adapters that it knows by name only."""
    if not (cfg.get("load_in_4bit") or cfg.get("load_in_8bit")):
        return
    if cfg.get("load_in_4bit"):
        from transformers.utils import is_torch_bf16_gpu_available

        bf16 = cfg.get("bf16", "auto")
        bf16 = is_torch_bf16_gpu_available() if bf16 == "auto" else bf16
        quantization = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": "bfloat16",  # ZeRO-3 can only split floating point
            "bnb_4bit_compute_dtype": "bfloat16" if bf16 else "float16" if cfg.get("fp16") else "float32",
            **(cfg.get("bnb_config_kwargs") or {}),
        }
    else:
        quantization = {"load_in_8bit": True}
    quantization["quant_method"] = "bitsandbytes"
    cfg["model_kwargs"] = {**(cfg.get("model_kwargs") or {}), "quantization_config": quantization}


def prepare_base(model: Any, cfg: Any, step_dropout: Sequence[float]) -> Any:
    """Check the loaded base and choose its attention implementation.

    Raises:
        ValueError: If the base is not quantized as configured, is on several devices, would lose gradients, or would
            ignore step dropout.
        NotImplementedError: If a layer would ignore step dropout.
    """
    import torch

    from axolotl_mote.model.attention import DENSE, prepare_attention
    from axolotl_mote.model.compat import attention_implementation, supports_flex_attention

    key = "load_in_4bit" if cfg.load_in_4bit else "load_in_8bit" if cfg.load_in_8bit else None
    if key and getattr(model, "quantization_method", None) is None:
        raise ValueError(f"{key} must quantize the base model; got one in {model.dtype}. Remove the key.")
    if uses_fsdp() and (kind := getattr(model, "quantization_method", None)) is not None:
        raise ValueError(
            f"base_model must not be quantized with fsdp_config and adapter: mote; got {kind}. Sharded quantized "
            "weights are untested with step routing. Use DeepSpeed ZeRO-3, or a base in full precision."
        )
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            "The model must be on one device per process with adapter: mote; got it spread over several by axolotl. "
            "Launch with `--launcher torchrun` (one process per GPU), or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    _check_checkpointing(model, cfg)
    for kind in _ropes_that_look_at_the_batch(model.config):
        LOG.warning(
            "rope_type %r: the base model's rotary embedding depends on the longest row of a batch once that exceeds "
            "the length of pretraining, so a row's loss depends on its batch mates. Keep sequence_len below it.",
            kind,
        )
    if any(step_dropout):
        if cfg.attn_implementation == "fp8":
            raise ValueError(
                "attn_implementation must not be fp8 with mote.step_dropout; its kernel would ignore dropped steps. "
                "Use flex_attention, or set mote.step_dropout: 0."
            )
        # flex_attention has no attention dropout.
        flex = supports_flex_attention(model) and not getattr(model.config.get_text_config(), "attention_dropout", 0)
        if torch.cuda.is_available() and attention_implementation(model.config) in DENSE and flex:
            # A dense mask costs about half a training step more on a GPU; flex_attention costs nothing.
            LOG.info("mote.step_dropout: %s -> flex_attention", attention_implementation(model.config))
            model.set_attn_implementation("flex_attention")
        prepare_attention(model)
        LOG.info("mote.step_dropout: through %s", attention_implementation(model.config))
    return model


def _check_checkpointing(model: Any, cfg: Any) -> None:
    """Reentrant checkpointing sees what a layer is given by position; keys and values of another layer come by name."""
    reentrant = (cfg.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    shared = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    if cfg.gradient_checkpointing and reentrant and shared and not cfg.inference:
        raise ValueError(
            "gradient_checkpointing_kwargs.use_reentrant must be false where layers share keys and values, or part of "
            f"the gradient is lost; got {reentrant} (axolotl's default is true) and {shared} such layers. Set "
            "gradient_checkpointing_kwargs: {use_reentrant: false}."
        )


def _ropes_that_look_at_the_batch(config: Any) -> list[str]:
    """Kinds of rotary embedding that change with the length of a batch; some models have one per kind of layer."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = [one for one in (found, *found.values()) if isinstance(one, dict)]
    return sorted({one["rope_type"] for one in each if one.get("rope_type") in ("dynamic", "longrope")})


def compile_layers(model: Any, cfg: Any) -> None:
    """Compile each decoder layer on its own, as the configuration asks."""
    from axolotl_mote.model import compiling

    backend = cfg.torch_compile_backend or "inductor"

    def warn(message: str) -> None:
        LOG.warning(
            "mote.compile: torch has stopped compiling a kind of layer, which now runs slowly and takes more memory. "
            "Use sample_packing with pad_to_sequence_len, so that batches have one shape, or mote.compile: off. "
            "torch says: %s",
            message,
        )

    compiling.compile_layers(
        model.get_base_model(),
        backend=backend,
        mode=cfg.torch_compile_mode,
        options=cfg.torch_compile_options or None,
        varying=not (cfg.sample_packing and cfg.pad_to_sequence_len),
        on_fallback=warn,
    )
    LOG.info("mote.compile: each decoder layer on its own, through %s", backend)
