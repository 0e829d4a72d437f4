"""`load_mote`: an adapter folder becomes a model and a tokenizer ready for inference.

``adapter_config.json`` is the one source of truth for steps, marker strings and marker ids; a tokenizer that disagrees
is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import axolotl_mote.model.adapter  # noqa: F401  (registers the PEFT type)
from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.model.config import PEFT_TYPE, MoteConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_mote(
    adapter_dir: str | Path,
    base_model: str | Path | None = None,
    *,
    dtype: Any = "auto",
    device: str | torch.device | None = None,
    **model_options: Any,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a trained adapter onto its base model.

    Args:
        adapter_dir: Folder with adapter_config.json and adapter_model.safetensors, as training wrote it.
        base_model: Base model folder or hub name; default: the one the adapter was trained on.
        dtype: Type of the base model's weights; "auto" keeps that of the checkpoint. The adapter stays in float32.
        device: Where to put the model; default: the first GPU if there is one. Ignored with ``device_map``. A
            quantized base is loaded there; it cannot be moved.
        **model_options: For ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ValueError: If the folder holds no MoTE adapter, or the tokenizer's markers are not those of the adapter.
    """
    config = read_adapter_config(adapter_dir)
    base = str(base_model or config.base_model_name_or_path)
    tokenizer = load_tokenizer(adapter_dir, base, config)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "device_map" not in model_options and _is_quantized(base, model_options):
        model_options["device_map"] = {"": place}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **model_options)
    if "device_map" not in model_options:
        model.to(place)
    return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=False).eval(), tokenizer


def _is_quantized(base: str, options: dict[str, Any]) -> bool:
    """Whether the base model is stored, or asked for, in quantized weights."""
    if options.get("quantization_config") is not None:
        return True
    config = AutoConfig.from_pretrained(base, trust_remote_code=options.get("trust_remote_code"))
    return getattr(config, "quantization_config", None) is not None


def read_adapter_config(adapter_dir: str | Path) -> MoteConfig:
    """Read adapter_config.json.

    Raises:
        ValueError: If the file is missing or of another PEFT type.
    """
    path = Path(adapter_dir) / "adapter_config.json"
    if not path.is_file():
        raise ValueError(
            f"adapter must be a folder with adapter_config.json; got none at {adapter_dir}. "
            "Pass the output_dir of a training run."
        )
    peft_type = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    if peft_type != PEFT_TYPE:
        raise ValueError(
            f"adapter must have peft_type {PEFT_TYPE}; got {peft_type} at {path}. Load it with peft.PeftModel instead."
        )
    config: MoteConfig = MoteConfig.from_pretrained(str(adapter_dir))
    return config


def load_tokenizer(adapter_dir: str | Path, base: str, config: MoteConfig) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, else the base model's with the markers added.

    Raises:
        ValueError: If a marker does not have the id the adapter was trained with.
    """
    saved = any((Path(adapter_dir) / name).is_file() for name in _TOKENIZER_FILES)
    tokenizer = AutoTokenizer.from_pretrained(str(adapter_dir) if saved else base)
    known = tokenizer.get_vocab()
    missing = [marker for marker in config.markers if marker not in known]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    _adapter_codec(tokenizer, config)
    return tokenizer


def codec_for(model: Any, tokenizer: PreTrainedTokenizerBase) -> ChainCodec:
    """The codec that fits a model: that of its MoTE adapter, else that of the markers in the tokenizer.

    The latter serves plain LoRA baselines and exported models.

    Args:
        model: Any model, with or without an adapter.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: If the tokenizer gives the markers other ids than the adapter, or neither knows a step.
    """
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapter", None)
    config = configs.get(active[0] if isinstance(active, list) else active) or next(iter(configs.values()), None)
    if isinstance(config, MoteConfig):
        return _adapter_codec(tokenizer, config)
    return ChainCodec.from_tokenizer(tokenizer)


def _adapter_codec(tokenizer: PreTrainedTokenizerBase, config: MoteConfig) -> ChainCodec:
    """The codec of an adapter, its marker ids checked against the adapter's."""
    codec = ChainCodec(tokenizer, config.steps)
    if codec.vocabulary != config.vocabulary:
        pairs = zip(config.markers, codec.vocabulary.marker_ids, config.marker_ids, strict=True)
        wrong = [f"{marker} {found} instead of {trained}" for marker, found, trained in pairs if found != trained]
        raise ValueError(
            f"tokenizer must give the markers the ids of the adapter; got {', '.join(wrong)}. "
            "Use the tokenizer files that training saved beside the adapter."
        )
    return codec
