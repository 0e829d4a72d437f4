"""Which base model an adapter was trained on: a few of its weights, kept in adapter_config.json.

Another model of the same shapes, such as a fine-tuned one, would be taken without a word, and answer wrongly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from axolotl_mote.model.markers import Gathered

_TABLES, _VALUES = 8, 8
"""Matrices that are sampled, and values of each."""

_ROUNDING = 2**-8 + 2**-11
"""Largest relative difference of one weight in two types: rounded to bfloat16 and, before it, to float16. Near zero,
float16 has nothing finer than 1e-7."""

_DIFFERENT = 0.1
"""Share of values that may differ."""


@torch.no_grad()
def sample_weights(
    model: nn.Module, marker_ids: Collection[int], gathered: Gathered = nullcontext
) -> dict[str, list[float]]:
    """A few weights of a base model.

    Args:
        model: The base model, with or without adapters.
        marker_ids: Rows of the embedding that are left out: a served base has others there.
        gathered: Makes a partitioned parameter readable.

    Returns:
        Values by name of the matrix; quantized matrices, and what cannot be read, are left out.
    """
    matrices = dict(_matrices(model))
    names = [*matrices]  # the embedding comes first
    chosen = dict.fromkeys(names[i * (len(names) - 1) // (_TABLES - 1)] for i in range(_TABLES)) if names else {}
    found = ((name, _values(matrices[name], marker_ids, gathered)) for name in chosen)
    return {name: values for name, values in found if values}


def check_origin(
    model: nn.Module,
    sample: Mapping[str, list[float]],
    trained_on: str | None,
    marker_ids: Collection[int],
    gathered: Gathered = nullcontext,
) -> None:
    """Check that a base model has the weights that an adapter was trained on.

    Args:
        model: The base model, with or without adapters.
        sample: ``sample_weights`` of the adapter's base; matrices that this model lacks or has quantized do not count.
        trained_on: Name of that base, for the message.
        marker_ids: Those of the adapter.
        gathered: Makes a partitioned parameter readable.

    Raises:
        ValueError: If more than a tenth of the weights are others.
    """
    matrices = dict(_matrices(model))
    pairs: list[tuple[float, float]] = []
    for name, values in sample.items():
        if name in matrices and len(own := _values(matrices[name], marker_ids, gathered)) == len(values):
            pairs += zip(values, own, strict=True)
    different = sum(abs(theirs - ours) > _ROUNDING * abs(theirs) + 1e-7 for theirs, ours in pairs)
    if different > _DIFFERENT * len(pairs):
        raise ValueError(
            f"base_model must be the one that the adapter was trained on, {trained_on}; got one that differs in "
            f"{different} of {len(pairs)} sampled weights. Use that model. If these are its weights in another form, "
            "remove base_sample from adapter_config.json."
        )


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's own matrices in floating point, by their names in a model without adapters."""
    for name, parameter in model.named_parameters():
        is_own = not any(part.startswith("lora_") for part in name.split("."))
        # Quantized weights have types of their own, and may claim to be bfloat16.
        is_plain = type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.element_size() > 1
        if is_own and is_plain and len(_shape(parameter)) == 2:
            yield name.replace(".base_layer.", "."), parameter


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _values(parameter: Tensor, marker_ids: Collection[int], gathered: Gathered) -> list[float]:
    """Values at fixed places, whatever the number of rows; none of a parameter that has no values here."""
    with gathered(parameter):
        if parameter.is_meta or not parameter.numel():
            return []
        rows, columns = parameter.shape
        wanted = [row for row in range(min(rows, 4 * _VALUES + len(marker_ids))) if row not in marker_ids]
        places = wanted[: 4 * _VALUES : 4]
        values = torch.stack([parameter[row, (37 * row + 11) % columns] for row in places])
        return values.float().tolist()
