"""What axolotl does for the adapters that it knows by name, and cannot do for ours: quantized bases, attention,
compilation, and processes on machines without accelerator. Nothing here knows of hooks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

LOG = logging.getLogger("axolotl.mote")  # below axolotl's logger, so that its handlers print it


def quantize_through_model_kwargs(cfg: dict[str, Any]) -> None:
    """Hand 4-bit and 8-bit loading to transformers; axolotl does so for the adapters that it knows by name only."""
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
    """Check the loaded base and choose its attention: refuse what is silently not as asked for.

    Raises:
        ValueError: If the base is not quantized as asked for, or its attention would ignore hidden steps.
    """
    import torch

    from axolotl_mote.attention import DENSE, implementation_of, prepare_attention

    key = "load_in_4bit" if cfg.load_in_4bit else "load_in_8bit" if cfg.load_in_8bit else None
    if key and getattr(model, "quantization_method", None) is None:
        raise ValueError(f"{key} must quantize the base model; it was loaded in {model.dtype}. Remove the key.")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            "The model must lie on one device per process with adapter: mote; axolotl spread it over several. Launch "
            "with `--launcher torchrun` (one process per GPU), or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if any(step_dropout):
        if cfg.attn_implementation == "fp8":
            raise ValueError(
                "attn_implementation must not be fp8 with mote.step_dropout, which its kernel would ignore. "
                "Use flex_attention, or set mote.step_dropout: 0."
            )
        if torch.cuda.is_available() and implementation_of(model.config) in DENSE and _takes_flex(model):
            # A dense mask costs about half a training step more on a GPU; flex_attention costs nothing.
            LOG.info("mote.step_dropout: %s -> flex_attention", implementation_of(model.config))
            model.set_attn_implementation("flex_attention")
        prepare_attention(model)
        LOG.info("mote.step_dropout: hidden steps through %s", implementation_of(model.config))
    return model


def _takes_flex(model: Any) -> bool:
    """flex_attention has no dropout of its own, and some models do not run on it."""
    text = model.config.get_text_config()
    return bool(getattr(model, "_supports_flex_attn", True)) and not getattr(text, "attention_dropout", 0)


def zero3() -> bool:
    """Whether DeepSpeed ZeRO-3 splits, or is going to split, the parameters over the ranks; axolotl says so here."""
    return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def compile_layers(model: Any, cfg: Any) -> None:
    """Compile each decoder layer on its own: they share one compilation, and the routing stays outside."""
    backend = cfg.torch_compile_backend or "inductor"
    options = dict(cfg.torch_compile_options or {}) or None
    for layer in model.get_base_model().get_decoder().layers:
        layer.compile(backend=backend, mode=cfg.torch_compile_mode, options=options)
    LOG.info("mote.compile: each decoder layer on its own, through %s", backend)


def let_cpu_processes_meet(deepspeed: bool) -> None:
    """Let several processes on a machine without accelerator train together, over gloo.

    accelerate leaves the back end empty there and then believes in a single process, and axolotl places the model of
    every process on the accelerator of its local rank. Only such runs are touched.
    """
    import torch
    from accelerate.state import DistributedType, PartialState

    if torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    prepare = PartialState._prepare_backend
    if getattr(prepare, "_mote", False):
        return
    from axolotl.loaders.model import ModelLoader

    place = ModelLoader._set_device_map_config

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, distributed_type = prepare(self, *args, **kwargs)
        # Without the type the processes would meet but no gradient be averaged.
        return (backend, distributed_type) if backend else ("gloo", DistributedType.MULTI_CPU)

    def set_device_map_config(self: Any) -> None:
        place(self)
        if "device_map" in self.model_kwargs:
            self.model_kwargs["device_map"] = {"": "cpu"}

    if deepspeed:
        from deepspeed.comm.torch import TorchBackend

        gather = TorchBackend.all_gather_into_tensor

        def all_gather_into_tensor(self: Any, output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
            # gloo copies through views of the output, which autograd forbids while ZeRO-1 and 2 gather parameters.
            return gather(self, output_tensor.detach(), input_tensor.detach(), *args, **kwargs)

        TorchBackend.all_gather_into_tensor = all_gather_into_tensor

    prepare_backend._mote = True  # type: ignore[attr-defined]
    PartialState._prepare_backend = prepare_backend
    ModelLoader._set_device_map_config = set_device_map_config
