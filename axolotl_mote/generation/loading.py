"""`load_mote`: an adapter folder becomes a model and a tokenizer ready for inference.

``adapter_config.json`` is the one source of truth for steps, marker strings and marker ids; a tokenizer that disagrees
is refused. That of a plain LoRA trained on chains holds the marker ids alone; the tokenizer saved with it spells them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import axolotl_mote.model.adapter  # noqa: F401  (registers the PEFT type)
from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import end_marker, start_marker
from axolotl_mote.generation.folder import Shapes, base_of, check_complete, check_fits, read_config, read_shapes
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.selfcheck import check_generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_mote(
    adapter_dir: str | Path,
    base_model: str | Path | None = None,
    *,
    dtype: Any = "auto",
    device: str | torch.device | None = None,
    self_check: bool = True,
    **model_options: Any,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a trained adapter onto its base model.

    Args:
        adapter_dir: Folder with adapter_config.json and adapter_model.safetensors, as training wrote it: a MoTE
            adapter, or a plain LoRA trained on chains (the baseline).
        base_model: Base model folder or hub name; default: the one the adapter was trained on.
        dtype: Type of the base model's weights; "auto" keeps that of the checkpoint. The adapter stays in float32.
        device: Where to put the model; default: the first GPU if there is one. Ignored with ``device_map``. A
            quantized base is loaded there; it cannot be moved.
        self_check: Check on one short chain that the base model generates as the adapter needs it.
        **model_options: For ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ValueError: If the folder holds no such adapter or not all of it, if the adapter was trained on another base
            model, if the tokenizer's markers are not those of the adapter, or if the self-check fails.
    """
    folder = Path(adapter_dir)
    config = read_config(folder)
    shapes = read_shapes(folder, config)
    base = base_of(config, folder, base_model)
    tokenizer = load_tokenizer(folder, base, config)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "device_map" not in model_options and _is_quantized(base, model_options):
        model_options["device_map"] = {"": place}
    model = load_base(base, dtype=dtype, **model_options)
    check_fits(model, base, shapes, config, folder)
    if not isinstance(config, MoteConfig):
        _add_marker_rows(model, shapes, codec_of(tokenizer, config))
    if "device_map" not in model_options:
        model.to(place)
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=False).eval()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if not isinstance(config, MoteConfig):
        check_complete(peft_model, shapes, folder)
    elif self_check:
        check_generation(peft_model)
    return peft_model, tokenizer


def load_base(base: str, **options: Any) -> PreTrainedModel:
    """The base model.

    Raises:
        ValueError: If a file of it is torn or empty.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, **options)
    except SafetensorError as error:
        raise ValueError(f"base_model must be whole; got {error} at {base}. Copy it again.") from error
    return model


def _add_marker_rows(model: PreTrainedModel, shapes: Shapes, codec: ChainCodec) -> None:
    """Give the tables of a plain LoRA's base model the size that they had in training; the adapter holds the rows."""
    tables = [shape[0] for name, shape in shapes.items() if name.endswith(".weight") and "lora_" not in name]
    rows = max([*tables, *(token + 1 for token in codec.vocabulary.marker_ids)])
    if model.get_input_embeddings().weight.shape[0] < rows:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _is_quantized(base: str, options: dict[str, Any]) -> bool:
    """Whether the base model is stored, or asked for, in quantized weights."""
    if options.get("quantization_config") is not None:
        return True
    config = AutoConfig.from_pretrained(base, trust_remote_code=options.get("trust_remote_code"))
    return getattr(config, "quantization_config", None) is not None


def load_tokenizer(adapter_dir: str | Path, base: str, config: LoraConfig) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, else the base model's with the markers added.

    Raises:
        ValueError: If its files are broken, or a marker does not have the id the adapter was trained with.
    """
    saved = any((Path(adapter_dir) / name).is_file() for name in _TOKENIZER_FILES)
    place = str(adapter_dir) if saved else base
    with _reading_tokenizer(place):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    if isinstance(config, MoteConfig):
        known = tokenizer.get_vocab()
        missing = [marker for marker in config.markers if marker not in known]
        if missing:
            tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    codec_of(tokenizer, config)
    return tokenizer


@contextmanager
def _reading_tokenizer(place: str) -> Iterator[None]:
    """Name the place of broken tokenizer files; the tokenizers library raises plain exceptions without one."""
    try:
        yield
    except OSError:  # names it
        raise
    except Exception as error:
        raise ValueError(f"tokenizer files must be whole; got {error} at {place}. Copy them again.") from error


def codec_for(model: Any, tokenizer: PreTrainedTokenizerBase) -> ChainCodec:
    """The codec that fits a model: that of its adapter, else that of the markers in the tokenizer.

    The latter serves exported models.

    Args:
        model: Any model, with or without an adapter.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: If the tokenizer gives the markers other ids than the adapter, or neither knows a step.
    """
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapter", None)
    return codec_of(
        tokenizer, configs.get(active[0] if isinstance(active, list) else active) or next(iter(configs.values()), None)
    )


def codec_of(tokenizer: PreTrainedTokenizerBase, config: Any) -> ChainCodec:
    """The codec that fits an adapter's configuration; see ``codec_for``.

    A plain LoRA's ``trainable_token_indices`` are the marker ids in the order of its steps, as the plugin set them.
    """
    if isinstance(config, MoteConfig):
        return _adapter_codec(tokenizer, config)
    indices = getattr(config, "trainable_token_indices", None) or []
    ids = next(iter(indices.values())) if isinstance(indices, dict) else indices
    if not ids:
        return _kept_codec(tokenizer, None, _settings(tokenizer))
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    names = [token[2:-2] for token in tokens]
    steps = [name for name in names if start_marker(name) in tokens and end_marker(name) in tokens]
    if not steps:
        raise ValueError(
            f"tokenizer must hold the markers that the LoRA was trained with, ids {ids}; got {tokens}. "
            "Use the tokenizer files that training saved beside the adapter."
        )
    return _kept_codec(tokenizer, tuple(steps), _settings(tokenizer))


def _settings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What a codec depends on besides the vocabulary's texts, and a program may change."""
    return str(len(tokenizer)), str(tokenizer.chat_template), str(tokenizer.special_tokens_map)


@lru_cache(maxsize=4)
def _kept_codec(
    tokenizer: PreTrainedTokenizerBase, steps: tuple[str, ...] | None, settings: tuple[str, ...]
) -> ChainCodec:
    """The codec of a tokenizer, made once and not for every answer.

    Reading it costs time, and the tokenizers package (0.23) never frees the 64 bytes of each token that it lists.
    """
    return ChainCodec.from_tokenizer(tokenizer) if steps is None else ChainCodec(tokenizer, steps)


def _adapter_codec(tokenizer: PreTrainedTokenizerBase, config: MoteConfig) -> ChainCodec:
    """The codec of an adapter, its marker ids checked against the adapter's."""
    codec = _kept_codec(tokenizer, tuple(config.steps), _settings(tokenizer))
    if codec.vocabulary != config.vocabulary:
        pairs = zip(config.markers, codec.vocabulary.marker_ids, config.marker_ids, strict=True)
        wrong = [f"{marker} {found} instead of {trained}" for marker, found, trained in pairs if found != trained]
        raise ValueError(
            f"tokenizer must give the markers the ids of the adapter; got {', '.join(wrong)}. "
            "Use the tokenizer files that training saved beside the adapter."
        )
    return codec
