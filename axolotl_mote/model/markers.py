"""The rows of the marker tokens: trained in the adapter, overlaid on the input embedding and the LM head.

The base model's tables are neither resized nor saved, even where they have no row for a marker. Ids in, embeddings and
logits out; no steps, no routing, no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import NoReturn, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from axolotl_mote.model.compat import copy_on_tensors, init_tuner_layer, move_adapter

Gathered = Callable[[Tensor], AbstractContextManager[object]]
"""Makes a parameter readable inside a block, where DeepSpeed ZeRO-3 has partitioned it."""


def refuse_merge() -> NoReturn:
    """Raise the error of every method that would merge step-routed experts."""
    raise NotImplementedError(
        "Step-routed experts cannot be merged into one weight: the weight depends on the token. "
        "Use `axolotl mote export`, which writes one plain LoRA adapter per step."
    )


class MarkerRows(nn.Module):
    """The trainable rows of the marker tokens, shape (2S, D): the adapter's own slice of the embedding table."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, as_head: bool) -> Tensor:
        """(..., D) -> marker logits (..., 2S) as a head; one-hot (..., 2S) -> rows (..., D) otherwise."""
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight) if as_head else x @ weight


class _MarkerLayer(nn.Module, BaseTunerLayer):
    """Base of both wrappers: the wrapped layer (input embedding or LM head), and of each adapter the ids and rows.

    To PEFT it is a tuner layer, so its rows are frozen, saved, loaded, switched and deleted like every other adapter
    weight.
    """

    adapter_layer_names = ("lora_marker_rows",)
    other_param_names = ("marker_ids",)
    base_layer: nn.Module
    lora_marker_rows: nn.ModuleDict
    marker_ids: dict[str, list[int]]

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_marker_rows = nn.ModuleDict({})
        self.marker_ids = {}
        self._on_device: dict[str, Tensor] = {}
        init_tuner_layer(self, adapter_name)

    @property
    def enabled_adapter(self) -> str | None:
        """The adapter whose rows are used; None for those of the base model."""
        names: list[str] = self.active_adapters  # type: ignore[assignment]
        return None if self.disable_adapters or not names else names[0]

    def _ids(self, adapter: str, device: torch.device) -> Tensor:
        """Ids of an adapter's markers on a device, shape (2S,)."""
        ids = self._on_device.get(adapter)
        if ids is None or ids.device != device:
            with torch.inference_mode(False):  # kept for later forwards, which may need gradients
                ids = self._on_device[adapter] = torch.tensor(self.marker_ids[adapter], device=device)
        return ids

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter's rows and ids."""
        super().delete_adapter(adapter_name)
        self._on_device.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        move_adapter(self, adapter_name, device)


class MarkerEmbedding(_MarkerLayer):
    """An input embedding whose marker rows come from the adapter, even where the table has no row for them."""

    def add_rows(self, adapter_name: str, marker_ids: list[int], rows: MarkerRows) -> None:
        """Add an adapter's markers."""
        self.marker_ids[adapter_name] = marker_ids
        self.lora_marker_rows[adapter_name] = rows

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed tokens, (B, T) -> (B, T, D), in the dtype of the base table."""
        adapter = self.enabled_adapter
        if adapter is None:
            embedded: Tensor = self.base_layer(input_ids)
            return embedded
        one_hot = input_ids.unsqueeze(-1) == self._ids(adapter, input_ids.device)  # (B, T, 2S)
        is_marker = one_hot.any(-1)
        embedded = self.base_layer(input_ids.masked_fill(is_marker, 0))
        rows = self.lora_marker_rows[adapter](one_hot.to(embedded.dtype), as_head=False)
        # Some models scale their embeddings inside the layer (Gemma 3); the rows are kept unscaled like the table's.
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is not None:
            rows = rows * torch.as_tensor(scale, dtype=rows.dtype, device=rows.device)
        return torch.where(is_marker.unsqueeze(-1), rows, embedded)


class PerLayerEmbedding(_MarkerLayer):
    """A second table that a model looks the same tokens up in (Gemma 3n, Gemma 4); ids beyond it read its row 0.

    It has no rows for markers to train. Row 0, the padding token's, is what Gemma 3n reads for ids beyond the table.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed tokens, (B, T) -> (B, T, L * D)."""
        size = cast(nn.Embedding, self.base_layer).num_embeddings
        embedded: Tensor = self.base_layer(input_ids.masked_fill(input_ids >= size, 0))
        return embedded


class MarkerHead(_MarkerLayer):
    """An LM head that takes the logits of the markers from the adapter, widened where the head has no column.

    With tied embeddings it uses the rows of the embedding and registers none of its own.

    Args:
        base_layer: The LM head.
        adapter_name: Name of the first adapter.
        tied_to: The embedding whose rows are used; None for rows of its own.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, tied_to: MarkerEmbedding | None) -> None:
        super().__init__(base_layer, adapter_name)
        self._tied_to = [tied_to]  # in a list, so that tied rows are not registered, and saved, a second time

    def add_rows(self, adapter_name: str, marker_ids: list[int], rows: MarkerRows) -> None:
        """Add an adapter's markers; ``rows`` is not used where the head is tied."""
        self.marker_ids[adapter_name] = marker_ids
        if self._tied_to[0] is None:
            self.lora_marker_rows[adapter_name] = rows

    @property
    def is_tied(self) -> bool:
        """Whether the embedding's rows are used."""
        return self._tied_to[0] is not None

    def _rows(self, adapter: str) -> nn.Module:
        owner = self if self._tied_to[0] is None else self._tied_to[0]
        return owner.lora_marker_rows[adapter]

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, (..., D) -> (..., max(V, last marker id + 1)); ids without a row anywhere get minus infinity."""
        # The last position of a prompt is a strided view; on the CPU torch would copy the weights for each of its rows.
        hidden = hidden.contiguous()
        logits: Tensor = self.base_layer(hidden)
        adapter = self.enabled_adapter
        return logits if adapter is None else self._join(logits, self._rows(adapter)(hidden, as_head=True), adapter)

    def _join(self, logits: Tensor, markers: Tensor, adapter: str) -> Tensor:
        """Put the logits of an adapter's markers, shape (..., 2S), into the base model's, shape (..., V)."""
        ids, markers = self.marker_ids[adapter], markers.to(logits.dtype)
        if ids == list(range(logits.shape[-1], logits.shape[-1] + len(ids))):
            return torch.cat([logits, markers], dim=-1)  # the common case, with one copy instead of two
        missing = max(ids) + 1 - logits.shape[-1]
        if missing > 0:
            logits = F.pad(logits, (0, missing), value=float("-inf"))
        return logits.index_copy(-1, self._ids(adapter, logits.device), markers)

    def held(self, gathered: Gathered) -> nn.Module:
        """This head with the weights of the active adapter and of the base layer read once, now.

        DeepSpeed ZeRO-3 gathers a module's weights for every call, from all ranks, so all of them must call it equally
        often; for a call that is repeated in the backward pass it does not gather them. What this returns may be called
        any number of times. The weights stay gathered as long as something refers to it.

        Args:
            gathered: Context manager that makes a partitioned parameter readable.
        """
        return _HeldHead(self, gathered)


class _HeldHead(nn.Module):
    head: MarkerHead
    layer: nn.Module
    rows: Tensor | None

    def __init__(self, head: MarkerHead, gathered: Gathered) -> None:
        super().__init__()
        base, adapter, rows = head.base_layer, head.enabled_adapter, None
        with ExitStack() as stack:
            for parameter in base.parameters():
                stack.enter_context(gathered(parameter))
            layer = copy_on_tensors(base)
        if adapter is not None:  # the rows are trained: their module is called, once too, and gives them a gradient
            one_hot = torch.eye(len(head.marker_ids[adapter]), device=cast(Tensor, layer.weight).device)
            rows = head._rows(adapter)(one_hot, as_head=False)
        # Not children: nothing of this is to be registered, and no hook is to see its calls.
        self.__dict__.update(head=head, layer=layer, rows=rows)

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.layer.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.layer.forward(hidden)
        rows, adapter = self.rows, self.head.enabled_adapter
        if rows is None or adapter is None:
            return logits
        return self.head._join(logits, F.linear(hidden, rows.to(hidden.dtype)), adapter)
