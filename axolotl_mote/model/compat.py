"""Every patch of torch, transformers and peft, and every private name of theirs that the model uses.

Each entry names what it works around and where that stands upstream. tests/model/test_model_compat.py fails when a
name or a signature changes. Tested with transformers 5.16.1 and 5.20.1, peft 0.20.0 and 0.21.2, torch 2.13.0.

The tuner also overrides private hooks, the only way to write a PEFT tuner: ``_pre_injection_hook``,
``_check_new_adapter_config``, ``_create_new_module`` and ``_post_injection_hook``.
Upstream: peft/tuners/tuners_utils.py, ``BaseTuner``; peft/tuners/lora/model.py, ``LoraModel``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

# The kernel call below transformers' flash attention functions, and the dtype that it needs. The functions themselves
# take no segment offsets that differ between queries and keys.
# Upstream: transformers/modeling_flash_attention_utils.py, integrations/flash_attention.py.
from transformers.integrations.flash_attention import get_target_dtype as get_target_dtype

# The registry behind the public AttentionMaskInterface, which can register a function but not look one up.
# Upstream: transformers/masking_utils.py.
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as ALL_MASK_ATTENTION_FUNCTIONS

# The hub kernels that transformers loads where flash-attn is not installed. They are registered under these names.
# Upstream: transformers/modeling_flash_attention_utils.py.
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK as FLASH_ATTN_KERNEL_FALLBACK
from transformers.modeling_flash_attention_utils import _flash_attention_forward as flash_attention_forward

# The same for the public AttentionInterface.
# Upstream: transformers/modeling_utils.py.
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ALL_ATTENTION_FUNCTIONS

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "FLASH_ATTN_KERNEL_FALLBACK",
    "attention_implementation",
    "carries_state",
    "cast_input",
    "find_attention_modules",
    "flash_attention_forward",
    "get_target_dtype",
    "init_tuner_layer",
    "intercept_attention",
    "register_peft_type",
    "supply_step_ids",
    "supports_flex_attention",
    "widen_vocabulary_in_generate",
]

# --- peft -----------------------------------------------------------------------------------------------------------


def register_peft_type(name: str, config_cls: type, model_cls: type) -> None:
    """Make a new PEFT type known to ``PeftModel.from_pretrained``.

    Works around: ``register_peft_method`` accepts only names that are members of the enum ``PeftType``, and an enum
    cannot be extended.
    Upstream: peft/utils/peft_types.py.
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)  # type: ignore[attr-defined]


def cast_input(layer: BaseTunerLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a layer's input to the dtype of the adapter, unless ``peft.helpers.disable_input_dtype_casting`` is active.

    Works around: PEFT's layers call a private method for it.
    Upstream: peft/tuners/tuners_utils.py, ``BaseTunerLayer._cast_input_dtype``.
    """
    return cast(Tensor, layer._cast_input_dtype(x, dtype))


def init_tuner_layer(layer: BaseTunerLayer, adapter_name: str) -> None:
    """Set the state that PEFT keeps in every tuner layer.

    Works around: ``BaseTunerLayer`` has no constructor; each of PEFT's layers sets these fields.
    Upstream: peft/tuners/tuners_utils.py, class attributes of ``BaseTunerLayer``.
    """
    layer._active_adapter = adapter_name
    layer._disable_adapters = False
    layer.merged_adapters = []
    layer.cast_input_dtype_enabled = True


# --- transformers: loading ------------------------------------------------------------------------------------------


# --- transformers: attention ----------------------------------------------------------------------------------------


def attention_implementation(config: PretrainedConfig) -> str:
    """Name of the attention implementation of a model's text layers.

    Works around: transformers has a public setter, ``set_attn_implementation``, and no public getter.
    Upstream: transformers/configuration_utils.py, ``PretrainedConfig._attn_implementation``.
    """
    return str(config.get_text_config()._attn_implementation)


def supports_flex_attention(model: PreTrainedModel) -> bool:
    """Whether a model's class runs on flex_attention.

    Works around: transformers has no public name for this.
    Upstream: transformers/modeling_utils.py, ``PreTrainedModel._supports_flex_attn``.
    """
    return bool(getattr(model, "_supports_flex_attn", True))


def carries_state(model: PreTrainedModel) -> bool:
    """Whether a model has recurrent layers, whose state no attention mask reaches.

    Works around: transformers has no public name for this.
    Upstream: transformers/modeling_utils.py, ``PreTrainedModel._is_stateful``.
    """
    return bool(getattr(model, "_is_stateful", False))


def find_attention_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The attention modules inside a module.

    Works around: they share no base class. All of them set ``is_causal``, which the attention functions read.
    Upstream: transformers/models/llama/modeling_llama.py, ``LlamaAttention``; integrations/sdpa_attention.py.
    """
    return (one for one in module.modules() if hasattr(one, "is_causal"))


def intercept_attention(name: str, attend: Callable[..., Tensor | None], like: str | None = None) -> None:
    """Have an attention function ask ``attend`` first, in every model; where that gives None, the function runs.

    Works around: transformers' flash attention functions take no segment offsets that differ between queries and keys,
    and models look their function up by name in a registry that all of them share. Calling it twice changes nothing.
    Upstream: transformers/modeling_utils.py, ``AttentionInterface``; masking_utils.py, ``AttentionMaskInterface``.

    Args:
        name: The function; one that is not registered is left alone.
        attend: (module, query, key, value, **kwargs) -> output (B, T, H, D), or None.
        like: Register ``name`` as a new function, which otherwise runs this one and takes its mask.
    """
    if like is not None:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[like])
    original = ALL_ATTENTION_FUNCTIONS.get(like or name)
    if original is None or hasattr(original, "intercepted"):
        return

    @functools.wraps(original)
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        output = attend(module, query, key, value, **kwargs)
        if output is not None:
            return output, None
        result: tuple[Tensor, Tensor | None] = original(module, query, key, value, attention_mask, *args, **kwargs)
        return result

    attention.intercepted = True  # type: ignore[attr-defined]
    AttentionInterface.register(name, attention)


# --- transformers: generation ---------------------------------------------------------------------------------------


def supply_step_ids(model: PreTrainedModel, step_ids_of: Callable[[Tensor], Tensor]) -> None:
    """Have ``generate`` pass ``step_ids`` to every forward.

    Works around: a forward that continues a KV cache gets the new tokens alone. ``prepare_inputs_for_generation`` is
    the one place that sees all of them.
    Upstream: transformers/generation/utils.py, ``GenerationMixin.prepare_inputs_for_generation``.

    Args:
        model: The model; its method is replaced on the instance.
        step_ids_of: (B, T) tokens -> (B, T) step ids.
    """
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != input_ids.shape[1]:
            raise ValueError(
                "input_ids must hold the whole sequence, not only what continues a cache, because the tokens are the "
                f"router; got {input_ids.shape[1]} of {mask.shape[1]} tokens. Pass all of them, and no "
                "prefill_chunk_size."
            )
        inputs: dict[str, Any] = prepare(input_ids, *args, **kwargs)
        if inputs.get("input_ids") is None:
            raise ValueError("input_ids must be given: the tokens are the router; got none. Pass input_ids.")
        fed = inputs["input_ids"].shape[1]
        inputs["step_ids"] = step_ids_of(input_ids)[:, -fed:]
        return inputs

    model.prepare_inputs_for_generation = prepare_inputs_for_generation


def widen_vocabulary_in_generate(
    model: PreTrainedModel, width: int, knows_markers: Callable[[nn.Module], bool]
) -> None:
    """Let ``generate`` see a vocabulary that holds the markers, also where the base model's table ends before them.

    Works around: beam search and prompt lookup read the width of the logits off ``config.vocab_size``. The
    configuration itself must keep the base model's size, or PEFT would take the table for resized and save it.
    Upstream: transformers/generation/utils.py, ``GenerationMixin.generate``; peft/utils/save_and_load.py.

    Args:
        model: The model; its method is replaced on the instance.
        width: Last marker id + 1.
        knows_markers: Whether the input embeddings of an assistant model hold the markers beyond their table.
    """
    generate = model.generate

    @functools.wraps(generate)
    def generate_wide(*args: Any, **kwargs: Any) -> Any:
        assistant = kwargs.get("assistant_model")
        models = [model] if assistant is None else [model, assistant]
        if assistant is not None:
            table = assistant.get_input_embeddings()
            if not knows_markers(table) and table.weight.shape[0] < width:
                raise ValueError(
                    f"assistant_model must have embeddings for the markers, up to id {width - 1}; its table has "
                    f"{table.weight.shape[0]} rows. Use a model with a MoTE adapter or an exported one."
                )
        configs = [one.config.get_text_config() for one in models]
        sizes = [config.vocab_size for config in configs]
        for config, size in zip(configs, sizes, strict=True):
            config.vocab_size = max(size, width)
        try:
            return generate(*args, **kwargs)
        finally:
            for config, size in zip(configs, sizes, strict=True):
                config.vocab_size = size

    model.generate = generate_wide
