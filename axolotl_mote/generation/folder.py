"""The folder of a trained adapter: its configuration and its tensors, checked before a base model is read.

Adapters are MoTE adapters, or plain LoRAs that were trained on chains (the baseline). Only safetensors are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from torch import nn

from axolotl_mote.model.config import PEFT_TYPE, MoteConfig, check_values

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Shapes = dict[str, tuple[int, ...]]
"""Name of each tensor of an adapter -> its shape."""

_PICKLE = "adapter_model.bin"
_LORA = "LORA"
_PREFIX = "base_model.model."
_A, _B, _MARKER_ROWS = ".lora_A.weight", ".lora_B.weight", ".lora_marker_rows.weight"
_PARTS = {_A: ("in_features", 1), _B: ("out_features", 0)}
"""End of a tensor's name -> the size of its layer that it must have, and in which dimension."""


def read_config_values(folder: Path) -> dict[str, Any]:
    """adapter_config.json as plain data.

    Raises:
        ValueError: If the file is missing or holds no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"adapter must be a folder with adapter_config.json; got none at {folder}. "
            "Pass the output_dir of a training run."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        values = error
    if not isinstance(values, dict):
        got = values if isinstance(values, Exception) else type(values).__name__
        raise ValueError(f"{CONFIG} must hold a JSON object; got {got} at {path}. Copy the adapter again.")
    return values


def read_config(folder: Path) -> LoraConfig:
    """The configuration of an adapter; a ``MoteConfig``, unless it is a plain LoRA.

    Raises:
        ValueError: If adapter_config.json is missing, broken, or of another PEFT type.
    """
    values, path = read_config_values(folder), folder / CONFIG
    peft_type = values.get("peft_type")
    if peft_type not in (PEFT_TYPE, _LORA):
        raise ValueError(
            f"adapter must have peft_type {PEFT_TYPE} or {_LORA}; got {peft_type} at {path}. "
            "Load it with peft.PeftModel instead."
        )
    if peft_type == PEFT_TYPE:
        config: LoraConfig = MoteConfig.from_pretrained(str(folder))
    else:
        config = _read_lora_config(folder, values)
    if not config.target_modules:
        raise ValueError(
            f"target_modules must name layers; got {config.target_modules} at {path}. "
            "Use the adapter_config.json that training wrote."
        )
    if isinstance(config, MoteConfig) and not config.marker_ids:
        raise ValueError(
            f"marker_ids must hold the token ids of {config.markers}; got {config.marker_ids} at {path}. "
            "Use the adapter_config.json that training wrote."
        )
    return config


def _read_lora_config(folder: Path, values: dict[str, Any]) -> LoraConfig:
    flag = "fan_in_fan_out"
    if values.get(flag, False) is None:  # axolotl writes null for false
        values = {key: value for key, value in values.items() if key != flag}
    try:
        check_values(LoraConfig, values)
        config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    return config


def read_mote_config(folder: Path) -> MoteConfig:
    """The configuration of a MoTE adapter.

    Raises:
        ValueError: As ``read_config``, and for a plain LoRA.
    """
    config = read_config(folder)
    if not isinstance(config, MoteConfig):
        raise ValueError(
            f"adapter must have peft_type {PEFT_TYPE}; got {_LORA} at {folder / CONFIG}. "
            "Load it with peft.PeftModel instead."
        )
    return config


def base_of(config: LoraConfig, folder: Path, base_model: str | Path | None) -> str:
    """The base model to load: the one that the caller names, else the one that the adapter was trained on.

    Raises:
        ValueError: If neither is known, or if the recorded folder is gone.
    """
    base = base_model or config.base_model_name_or_path
    if not base:
        raise ValueError(f"base_model must be given; got none, and none at {folder / CONFIG}. Name the base model.")
    if base_model is None and Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"base_model must be a folder or a hub name; got {base} at {folder / CONFIG}, which does not exist. "
            "Pass the base model's present folder."
        )
    return str(base)


def read_shapes(folder: Path, config: LoraConfig) -> Shapes:
    """Names and shapes of an adapter's tensors, from the head of the file.

    Raises:
        ValueError: If adapter_model.safetensors is missing, torn or empty, or its tensors are not of the rank, or the
            number of markers, of the configuration.
    """
    with _weights(folder) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    _check_shapes(shapes, config, folder)
    return shapes


def read_tensors(folder: Path, config: LoraConfig) -> dict[str, Tensor]:
    """An adapter's tensors.

    Raises:
        ValueError: As ``read_shapes``.
    """
    names = read_shapes(folder, config)
    with _weights(folder) as file:
        return {name: file.get_tensor(name) for name in names}


def _check_shapes(shapes: Shapes, config: LoraConfig, folder: Path) -> None:
    """Check that tensors have two dimensions, and the size that the configuration gives to one of them.

    Without the base model, and before anything of the size that a wrong rank gives is allocated.
    """
    sizes: dict[str, tuple[int, int]] = {}
    if isinstance(config, MoteConfig):
        sizes = {_A: (0, config.total_rank), _B: (1, config.total_rank), _MARKER_ROWS: (0, 2 * config.num_steps)}
    elif not config.rank_pattern:
        sizes = {_A: (0, config.r), _B: (1, config.r)}
    for name, shape in shapes.items():
        for end, (dimension, size) in sizes.items():
            if name.endswith(end) and (len(shape) != 2 or shape[dimension] != size):
                wanted = f"({size}, ...)" if dimension == 0 else f"(..., {size})"
                raise ValueError(
                    f"{name} must have shape {wanted} by {CONFIG}; got {shape} in {WEIGHTS} at {folder}. "
                    "Use both files as training wrote them."
                )


@contextmanager
def _weights(folder: Path) -> Iterator[Any]:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / _PICKLE).is_file():
            raise ValueError(
                f"adapter must hold {WEIGHTS}; got {_PICKLE} at {folder}, a pickle file, which can run code. "
                "Save the adapter as safetensors."
            )
        raise ValueError(f"adapter must hold {WEIGHTS}; got none at {folder}. Pass the output_dir of a finished run.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} must be whole; got {error} at {path}. Copy the adapter again.") from error


def check_fits(model: Any, base: str, shapes: Shapes, config: LoraConfig, folder: Path) -> None:
    """Check that an adapter was trained on a base model of this architecture and size, and covers its layers.

    Args:
        model: The base model, without the adapter.
        base: Its folder or name.
        shapes: From ``read_shapes``.
        config: From ``read_config``.
        folder: Where the adapter is.

    Raises:
        ValueError: If layers that it changes are missing or of another size, or it lacks layers that it should change.
    """
    faults: list[str] = []
    layers: set[str] = set()
    modules = dict(model.named_modules())
    for tensor, shape in shapes.items():
        for end, (size, dimension) in _PARTS.items():
            if not tensor.endswith(end):
                continue
            name = tensor.removesuffix(end).removeprefix(_PREFIX)
            here = getattr(modules[name], size, None) if name in modules else "no such layer"
            if name not in layers and here is not None and here != shape[dimension]:
                faults.append(f"{name} has {size} {shape[dimension]} in the adapter and {here} in the base model")
                layers.add(name)
    if faults:
        raise ValueError(
            f"adapter must fit the base model; got {folder}, trained on {config.base_model_name_or_path}, for {base}: "
            f"{faults[0]}{f', and {len(faults) - 1} more layers differ' if len(faults) > 1 else ''}. "
            "Pass the base model that it was trained on."
        )
    targets = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and check_target_module_exists(config, name)
    ]
    _raise_missing((f"{_PREFIX}{name}{end}" for name in targets for end in _PARTS), shapes, folder)


def check_complete(model: Any, shapes: Mapping[str, object], folder: Path) -> None:
    """Check that the file held every tensor of a plain LoRA that a model now has: PEFT only warns.

    A MoTE adapter makes this check itself, whatever loads it (``model.adapter``).

    Raises:
        ValueError: If tensors are missing.
    """
    _raise_missing(sorted(get_peft_model_state_dict(model, save_embedding_layers=False)), shapes, folder)


def _raise_missing(wanted: Iterable[str], shapes: Mapping[str, object], folder: Path) -> None:
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise ValueError(
            f"{WEIGHTS} must hold every tensor of the adapter; got none for {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''} at {folder}. Copy the adapter again."
        )
