"""`load_mote`: an adapter folder becomes a model and a tokenizer ready for inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_mote(
    adapter_dir: str | Path,
    base_model: str | Path | None = None,
    *,
    dtype: Any = "auto",
    device: Any = None,
    **model_options: Any,
) -> tuple[Any, Any]:
    """Load a trained adapter onto its base model.

    Args:
        adapter_dir: Folder with adapter_config.json and adapter_model.safetensors, as training wrote it.
        base_model: Base model folder or hub name; default: the one the adapter was trained on.
        dtype: Type of the base model's weights; "auto" keeps that of the checkpoint. The adapter stays in float32.
        device: Where to put the model; default: the first GPU if there is one. Left alone with ``device_map``. A
            quantized base is loaded there; it cannot be moved.
        **model_options: For ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ValueError: If the folder holds no MoTE adapter, or the tokenizer's markers are not those of the adapter.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import axolotl_mote.adapter  # noqa: F401  (registers the PEFT type)

    config = read_adapter_config(adapter_dir)
    base = str(base_model or config["base_model_name_or_path"])
    tokenizer = load_tokenizer(adapter_dir, base, config)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "device_map" not in model_options and _is_quantized(base, model_options):
        model_options["device_map"] = {"": place}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **model_options)
    if "device_map" not in model_options:
        model.to(place)
    model = PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=False)
    return model.eval(), tokenizer


def _is_quantized(base: str, options: dict[str, Any]) -> bool:
    """Whether the base model is stored, or asked for, in quantized weights."""
    from transformers import AutoConfig

    if options.get("quantization_config") is not None:
        return True
    config = AutoConfig.from_pretrained(base, trust_remote_code=options.get("trust_remote_code"))
    return getattr(config, "quantization_config", None) is not None


def read_adapter_config(adapter_dir: str | Path) -> dict[str, Any]:
    """Read adapter_config.json and refuse what is not a MoTE adapter.

    Raises:
        ValueError: If the file is missing or of another PEFT type.
    """
    path = Path(adapter_dir) / "adapter_config.json"
    if not path.is_file():
        raise ValueError(
            f"adapter must be a folder with adapter_config.json; found none at {adapter_dir}. "
            "Pass the output_dir of a training run."
        )
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") != "MOTE":
        raise ValueError(
            f"adapter must have peft_type MOTE; got {config.get('peft_type')} at {path}. "
            "Load it with peft.PeftModel instead."
        )
    return config


def load_tokenizer(adapter_dir: str | Path, base: str, config: dict[str, Any]) -> Any:
    """The tokenizer saved with the adapter, else the base model's with the markers added; ids are checked.

    Raises:
        ValueError: If a marker does not have the id the adapter was trained with.
    """
    from transformers import AutoTokenizer

    saved = any((Path(adapter_dir) / name).is_file() for name in _TOKENIZER_FILES)
    tokenizer = AutoTokenizer.from_pretrained(str(adapter_dir) if saved else base)
    markers, ids = config["markers"], config["marker_ids"]
    known = tokenizer.get_vocab()
    missing = [marker for marker in markers if marker not in known]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    found = tokenizer.convert_tokens_to_ids(markers)
    if found != ids:
        wrong = [f"{m} {f} instead of {i}" for m, f, i in zip(markers, found, ids, strict=True) if f != i]
        raise ValueError(
            f"tokenizer must give the markers the ids of the adapter; got {', '.join(wrong)}. "
            "Use the tokenizer files that training saved beside the adapter."
        )
    return tokenizer
