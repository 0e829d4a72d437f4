"""What the export writes: adapter folders that plain PEFT loads, and a base model with the marker rows baked in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from axolotl_mote.config import MoteConfig
from axolotl_mote.export.weights import AdapterPlan, build_adapter, marker_rows, shared_updates

_PREFIX = "base_model.model."
_KEPT = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type")


def read_adapter(folder: Path) -> tuple[MoteConfig, dict[str, Tensor]]:
    """Configuration and tensors of a MoTE adapter folder."""
    from axolotl_mote.generation.loading import read_adapter_config

    known = set(MoteConfig.__dataclass_fields__)
    config = MoteConfig(**{k: v for k, v in read_adapter_config(folder).items() if k in known and k != "peft_type"})
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ValueError(
            f"adapter must hold adapter_model.safetensors; found none at {folder}. Save it as safetensors."
        )
    return config, load_file(path)


def write_adapter(
    folder: Path, base: str, config: MoteConfig, plan: AdapterPlan, tensors: Mapping[str, Tensor]
) -> None:
    """Write one plain LoRA adapter: adapter_config.json and adapter_model.safetensors."""
    from peft import LoraConfig

    lora = LoraConfig(
        r=plan.served_rank,
        lora_alpha=plan.served_rank,
        lora_dropout=0.0,
        inference_mode=True,
        base_model_name_or_path=base,
        **{name: getattr(config, name) for name in _KEPT},
    )
    folder.mkdir(parents=True)
    lora.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    save_file(build_adapter(tensors, plan), weights, metadata={"format": "pt"})
    weights.chmod((folder / "adapter_config.json").stat().st_mode)  # safetensors writes for the owner only


def write_base(
    folder: Path, model: Any, tokenizer: Any, config: MoteConfig, tensors: Mapping[str, Tensor], merge_shared: bool
) -> None:
    """Bake the marker rows (and on request the shared expert) into a base model and save it with its tokenizer.

    Args:
        folder: Where to write.
        model: The base model, without adapter; it is changed.
        tokenizer: Knows the markers.
        config: Gives the marker ids.
        tensors: The tensors of the MoTE adapter.
        merge_shared: Add the shared expert to the weights.

    Raises:
        ValueError: If the shared expert is to be merged into quantized weights.
    """
    if merge_shared:
        _merge_shared(model, config, tensors)
    bake_markers(model, config, tensors)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def bake_markers(model: Any, config: MoteConfig, tensors: Mapping[str, Tensor]) -> None:
    """Give the markers real rows in the embedding table and the output head."""
    rows = max(config.marker_ids) + 1
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is table.weight
    if table.weight.shape[0] < rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    for_table, for_head = marker_rows(tensors)
    _put(table.weight, config.marker_ids, for_table)
    if not tied:
        _put(head.weight, config.marker_ids, for_head)


def _put(weight: Tensor, ids: list[int], rows: Tensor) -> None:
    weight[ids] = rows.to(weight.dtype).to(weight.device)


@torch.no_grad()
def _merge_shared(model: Any, config: MoteConfig, tensors: Mapping[str, Tensor]) -> None:
    for name, update in shared_updates(tensors, config):
        module: nn.Module = model.get_submodule(name.removeprefix(_PREFIX))
        weight = module.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != update.shape:
            raise ValueError(
                f"--merge-shared must meet plain weights; {name} has {getattr(weight, 'dtype', type(weight))} "
                f"of shape {tuple(getattr(weight, 'shape', ()))}. Export from the unquantized base model."
            )
        weight.copy_((weight.float() + update.to(weight.device)).to(weight.dtype))


def write_json(path: Path, content: Any) -> None:
    """Write a small report."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
