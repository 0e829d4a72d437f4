"""Every patch of torch, transformers and peft, and every private name of theirs that the model uses.

Each entry names what it works around and where that stands upstream. tests/model/test_model_compat.py fails when a
name or a signature changes, and a name that is gone is an error when this module is imported. Tested with transformers
5.16.1, 5.20.1 and 5.24.0, peft 0.20.0 and 0.21.2, torch 2.13.0; ``axolotl_mote.versions`` has the range.

The tuner also overrides private methods, the only way to write a PEFT tuner: ``_create_new_module``,
``_enable_peft_forward_hooks`` and, in its layers, ``_move_adapter_to_device_of_base_layer``.
Upstream: peft/tuners/tuners_utils.py, ``BaseTuner`` and ``BaseTunerLayer``; peft/tuners/lora/model.py, ``LoraModel``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import peft.peft_model
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType, register_peft_method, save_and_load
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PretrainedConfig, PreTrainedModel

from axolotl_mote.versions import private_names

with private_names():
    # The check that PEFT makes of its own types alone.
    # Upstream: peft/tuners/tuners_utils.py.
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check_mamba

    # The kernel call below transformers' flash attention functions, and the dtype that it needs. The functions
    # themselves take no segment offsets that differ between queries and keys.
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

    # What is overridden, or used further down: without these, experts would be missing, or guards silent.
    _USED = (
        BaseTunerLayer._cast_input_dtype,
        BaseTunerLayer._get_base_layer_device_and_dtype,
        BaseTunerLayer._move_adapter_to_device_of_base_layer,
        LoraModel._create_new_module,
        LoraModel._enable_peft_forward_hooks,
        PretrainedConfig._attn_implementation,
        PreTrainedModel._is_stateful,
        PreTrainedModel._supports_flex_attn,
    )

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "FLASH_ATTN_KERNEL_FALLBACK",
    "attention_implementation",
    "bypasses_lora",
    "cached_length",
    "carries_state",
    "cast_input",
    "copy_on_tensors",
    "decoder_layers",
    "eager_flex_attention",
    "find_attention_modules",
    "find_cache",
    "flash_attention_forward",
    "get_target_dtype",
    "init_tuner_layer",
    "intercept_attention",
    "move_adapter",
    "named_cache",
    "prepare_compilation",
    "register_peft_type",
    "save_adapter_alone",
    "supports_flex_attention",
    "text_decoder",
]

# --- torch ----------------------------------------------------------------------------------------------------------

_RECOMPILE_LIMIT = 64


def prepare_compilation(on_fallback: Callable[[str], None]) -> None:
    """Set what compiled layers need of dynamo, in the whole process.

    Works around: with symbolic shapes dynamo makes an attribute such as Gemma 2's soft cap a symbolic number, which
    flex_attention cannot take: the layer falls apart into eager pieces. The limit of 8 compilations counts all layers
    of a class together, and dynamo reports it through its own logger alone.
    Upstream: torch/_dynamo/config.py, ``specialize_float`` and ``recompile_limit``; torch/_dynamo/convert_frame.py.

    Args:
        on_fallback: Called with dynamo's message when a limit is reached; replaces the function of an earlier call.
    """
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    logger = logging.getLogger("torch._dynamo.convert_frame")
    for handler in [one for one in logger.handlers if isinstance(one, _OnRecompileLimit)]:
        logger.removeHandler(handler)
    logger.addHandler(_OnRecompileLimit(on_fallback))


class _OnRecompileLimit(logging.Handler):
    def __init__(self, on_fallback: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.on_fallback = on_fallback

    def emit(self, record: logging.LogRecord) -> None:
        if "hit config." in str(record.msg):
            self.on_fallback(record.getMessage())


def copy_on_tensors(layer: nn.Module) -> nn.Module:
    """A layer without children, again, whose parameters are plain tensors on the same storage.

    Works around: torch offers no view of a module. ``torch.func.functional_call`` runs its hooks, and DeepSpeed frees a
    parameter by giving it another tensor, so only a tensor of one's own keeps the values.
    Upstream: torch/nn/modules/module.py, ``Module._parameters``; deepspeed/runtime/zero/partition_parameters.py,
    ``free_param``.
    """
    twin = copy.copy(layer)
    values = {name: None if value is None else value.data for name, value in layer._parameters.items()}
    twin.__dict__["_parameters"] = values
    return twin


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


def save_adapter_alone(name: str) -> None:
    """Keep the base model's tables out of the state of adapters of a type. Calling it twice changes nothing.

    Works around: PEFT saves both tables whole if ``config.vocab_size`` is not that of the base model's file. AutoPeft
    resizes the base to the saved tokenizer, so that a loaded adapter would grow when it is saved again. PEFT chooses by
    its own list of types, and offers no hook.
    Upstream: peft/utils/save_and_load.py, ``get_peft_model_state_dict``; peft/auto.py.
    """
    original = save_and_load.get_peft_model_state_dict
    if hasattr(original, "leaves_tables_out"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def adapter_state(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        if values["model"].peft_config[values["adapter_name"]].peft_type == name:
            if values["save_embedding_layers"] is True:
                raise ValueError(
                    f"save_embedding_layers must not be true with a {name} adapter, which trains no rows but those of "
                    "its markers. Leave it out, and save the base model itself."
                )
            values["save_embedding_layers"] = False
        state: dict[str, Tensor] = original(*given.args, **given.kwargs)
        return state

    adapter_state.leaves_tables_out = True  # type: ignore[attr-defined]
    for module in (save_and_load, peft.utils, peft, peft.peft_model):
        module.get_peft_model_state_dict = adapter_state


def bypasses_lora(model: nn.Module, name: str) -> bool:
    """Whether PEFT refuses a LoRA on a layer because fused kernels read its weight and never call it (Mamba).

    Works around: PEFT checks types of its own alone, and an exported expert is one of them.
    Upstream: peft/tuners/tuners_utils.py, ``_check_lora_target_modules_mamba``.

    Args:
        model: The base model.
        name: Last part of the layer's name.
    """
    try:
        check_mamba(LoraConfig(), model, name)
    except ValueError:
        return True
    return False


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


def move_adapter(layer: BaseTunerLayer, adapter_name: str, device: torch.device | None) -> None:
    """Move an adapter's weights to the device of the layer that they stand on, and leave their dtype alone.

    Works around: PEFT also casts them to the base layer's dtype. With ``low_cpu_mem_usage`` it does so after loading,
    which rounds float32 weights to a half-precision base's.
    Upstream: peft/tuners/tuners_utils.py, ``BaseTunerLayer._move_adapter_to_device_of_base_layer``.
    """
    device = device or layer._get_base_layer_device_and_dtype(layer.get_base_layer())[0]
    for name in layer.adapter_layer_names:
        modules = getattr(layer, name)
        if device is None or adapter_name not in modules:
            continue
        if not any(parameter.is_meta for parameter in modules[adapter_name].parameters()):
            modules[adapter_name].to(device)


# --- transformers: models --------------------------------------------------------------------------------------------


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal model that turns tokens into hidden states: with the input embedding, without the head.

    Works around: ``get_decoder`` gives the model itself for Llama-4 and Mllama, and a layer of the head for
    ModernBERT, because it looks for attributes by name.
    Upstream: transformers/modeling_utils.py, ``PreTrainedModel.get_decoder``.

    Raises:
        ValueError: If the model has an encoder as well, or no such part.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"base_model must be a decoder-only model; got {type(model).__name__}, which has an encoder. "
            "Use another base model."
        )
    embedding = model.get_input_embeddings()
    for part in (model.get_decoder(), *model.children()):
        if not isinstance(part, PreTrainedModel) or part is model:
            continue
        if part.get_input_embeddings() is embedding and part.get_output_embeddings() is None:
            return part
    raise ValueError(
        f"base_model must be a causal model with a text decoder and a head; got {type(model).__name__}, in which no "
        "part holds the input embedding and not the head. Use another base model."
    )


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a text decoder; the decoder itself where they cannot be told.

    Works around: transformers has no name for them. Most families say ``layers``, others ``h`` or ``blocks``.
    Upstream: transformers/models/llama/modeling_llama.py, ``LlamaModel``; models/bloom/modeling_bloom.py.
    """
    lists = {name: child for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    found = lists.get("layers") or (next(iter(lists.values())) if len(lists) == 1 else [decoder])
    return list(found)


def named_cache(values: Mapping[str, Any]) -> dict[str, Any]:
    """The cache in a model's output or among its arguments, under the name that the model's forward has for it.

    Works around: the name is ``cache`` since transformers 5.24; before, it was ``past_key_values``, and
    ``cache_params`` in recurrent models.
    Upstream: transformers/generation/utils.py, ``ALL_CACHE_NAMES``.

    Returns:
        One entry, or none where there is no cache.
    """
    for name in ("cache", "past_key_values", "cache_params"):  # outputs answer to the old names too
        if values.get(name) is not None:
            return {name: values[name]}
    return {}


def find_cache(values: Mapping[str, Any]) -> Any:
    """The cache in a model's output or among its arguments; None where there is none. See ``named_cache``."""
    return next(iter(named_cache(values).values()), None)


def cached_length(cache: Any) -> Any:
    """Number of tokens in a cache: an int or, in a static cache, a tensor; None where it cannot be told.

    Works around: a cache of recurrent layers alone has no length and raises an error, and some models have a cache
    class of their own.
    Upstream: transformers/cache_utils.py, ``Cache.get_seq_length``.
    """
    if not isinstance(cache, Cache):
        return None
    try:
        return cache.get_seq_length()
    except ValueError:
        return None


# --- transformers: attention ----------------------------------------------------------------------------------------


def attention_implementation(config: PretrainedConfig) -> str:
    """Name of the attention implementation of a model's text layers.

    Works around: transformers has a public setter, ``set_attn_implementation``, and no public getter.
    Upstream: transformers/configuration_utils.py, ``PretrainedConfig._attn_implementation``.
    """
    return str(config.get_text_config()._attn_implementation)


@contextmanager
def eager_flex_attention(model: PreTrainedModel) -> Iterator[None]:
    """Have a model run without flex_attention inside the block: it would compile, and cannot go backward on a CPU.

    Works around: the public setter cannot put back what the parts of a model had.
    Upstream: transformers/configuration_utils.py, ``PretrainedConfig._attn_implementation``.
    """
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    flexible = [one for one in configs.values() if one._attn_implementation == "flex_attention"]
    for config in flexible:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config in flexible:
            config._attn_implementation = "flex_attention"


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
