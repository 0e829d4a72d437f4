"""What the export writes: adapter folders for plain PEFT, and a base model that contains the marker rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from axolotl_mote.export.weights import AdapterPlan, build_adapter, marker_rows, shared_updates
from axolotl_mote.generation.folder import read_mote_config, read_tensors
from axolotl_mote.model.adapter import PER_LAYER
from axolotl_mote.model.compat import text_decoder
from axolotl_mote.model.config import MoteConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PREFIX = "base_model.model."
_KEPT = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type")


def read_adapter(folder: Path) -> tuple[MoteConfig, dict[str, Tensor]]:
    """Configuration and tensors of a MoTE adapter folder.

    Raises:
        ValueError: If one of the two is missing or broken, or the adapter is a plain LoRA.
    """
    config = read_mote_config(folder)
    return config, read_tensors(folder, config)


def write_adapter(
    folder: Path, base: str, config: MoteConfig, plan: AdapterPlan, tensors: Mapping[str, Tensor]
) -> None:
    """Write one plain LoRA adapter: adapter_config.json and adapter_model.safetensors."""
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
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: MoteConfig,
    tensors: Mapping[str, Tensor],
    merge_shared: bool,
) -> None:
    """Write the marker rows (and on request the shared expert) into a base model and save it with its tokenizer.

    Args:
        folder: Where to write.
        model: The base model, without an adapter; it is changed.
        tokenizer: Its tokenizer, with the markers.
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
def bake_markers(model: PreTrainedModel, config: MoteConfig, tensors: Mapping[str, Tensor]) -> None:
    """Put the marker rows into the embedding table and the output head."""
    rows = max(config.marker_ids) + 1
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is table.weight
    per_layer = getattr(text_decoder(model), PER_LAYER, None)
    own = table.weight.shape[0] if per_layer is None else per_layer.weight.shape[0]
    if min(own, table.weight.shape[0]) < rows:
        model.resize_token_embeddings(max(rows, table.weight.shape[0]), mean_resizing=False)
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if hasattr(model.config, "decoder_vocab_size"):  # the size that Marian builds its table of
            model.config.decoder_vocab_size = table.weight.shape[0]
        if per_layer is not None:  # resized with the table; the step-routed model reads row 0 for these ids
            weight = getattr(text_decoder(model), PER_LAYER).weight
            weight[own:] = weight[0]
    for_table, for_head = marker_rows(tensors)
    _put(table.weight, config.marker_ids, for_table)
    if not tied:
        _put(head.weight, config.marker_ids, for_head)


def _put(weight: Tensor, ids: list[int], rows: Tensor) -> None:
    weight[ids] = rows.to(weight.dtype).to(weight.device)


@torch.no_grad()
def _merge_shared(model: PreTrainedModel, config: MoteConfig, tensors: Mapping[str, Tensor]) -> None:
    for name, update in shared_updates(tensors, config):
        module: nn.Module = model.get_submodule(name.removeprefix(_PREFIX))
        weight = module.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != update.shape:
            raise ValueError(
                f"--merge-shared must have plain base weights; got {getattr(weight, 'dtype', type(weight))} of shape "
                f"{tuple(getattr(weight, 'shape', ()))} at {name}. Export from the unquantized base model."
            )
        weight.copy_((weight.float() + update.to(weight.device)).to(weight.dtype))


def load_written_base(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load what ``write_base`` wrote.

    Raises:
        ValueError: If transformers cannot load it again, now that its tables hold the markers.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except RuntimeError as error:  # tensors of other sizes than the configuration says
        raise ValueError(
            f"exported base must load again in its new size; got {error}. Nothing was written. transformers cannot "
            "resize this family's tables. Use load_mote."
        ) from error
    return model
