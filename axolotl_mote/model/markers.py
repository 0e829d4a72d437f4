"""The rows of the marker tokens: trained in the adapter, overlaid on the input embedding and the LM head.

The base model's tables are neither resized nor saved, even where they have no row for a marker. Ids in, embeddings and
logits out; no steps, no routing, no tokenizer.
"""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from axolotl_mote.model.compat import init_tuner_layer


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
    """Base of both wrappers: the wrapped layer (input embedding or LM head), the ids of the markers and their rows.

    To PEFT it is a tuner layer, so its rows are frozen, saved and loaded like every other adapter weight.
    """

    adapter_layer_names = ("lora_marker_rows",)
    other_param_names = ()
    base_layer: nn.Module
    marker_ids: Tensor

    def __init__(self, base_layer: nn.Module, marker_ids: list[int], adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_marker_rows = nn.ModuleDict({})
        self.register_buffer("marker_ids", torch.tensor(marker_ids), persistent=False)
        init_tuner_layer(self, adapter_name)

    def _ids(self, device: torch.device) -> Tensor:
        """Ids of the markers on a device. Only this moves them if the model was placed before the adapter was added."""
        if self.marker_ids.device != device:
            self.marker_ids = self.marker_ids.to(device)
        return self.marker_ids

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()


class MarkerEmbedding(_MarkerLayer):
    """An input embedding whose marker rows come from the adapter, even where the table has no row for them."""

    def __init__(self, base_layer: nn.Module, marker_ids: list[int], rows: MarkerRows, adapter_name: str) -> None:
        super().__init__(base_layer, marker_ids, adapter_name)
        self.lora_marker_rows[adapter_name] = rows
        self.adapter_name = adapter_name

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed tokens, (B, T) -> (B, T, D), in the dtype of the base table."""
        one_hot = input_ids.unsqueeze(-1) == self._ids(input_ids.device)  # (B, T, 2S)
        is_marker = one_hot.any(-1)
        embedded: Tensor = self.base_layer(input_ids.masked_fill(is_marker, 0))
        rows = self.lora_marker_rows[self.adapter_name](one_hot.to(embedded.dtype), as_head=False)
        # Some models scale their embeddings inside the layer (Gemma 3); the rows are kept unscaled like the table's.
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is not None:
            rows = rows * torch.as_tensor(scale, dtype=rows.dtype, device=rows.device)
        return torch.where(is_marker.unsqueeze(-1), rows, embedded)


class MarkerHead(_MarkerLayer):
    """An LM head that takes the logits of the markers from the adapter, widened where the head has no column.

    With tied embeddings it uses the rows of the embedding and registers none of its own.
    """

    def __init__(
        self, base_layer: nn.Module, marker_ids: list[int], rows: MarkerRows, adapter_name: str, tied: bool
    ) -> None:
        super().__init__(base_layer, marker_ids, adapter_name)
        if not tied:
            self.lora_marker_rows[adapter_name] = rows
        self._rows = [rows]  # in a list, so that tied rows are not registered, and saved, a second time
        self._width = max(marker_ids) + 1
        contiguous = marker_ids == list(range(marker_ids[0], self._width))
        self._follow_on_from = marker_ids[0] if contiguous else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, (..., D) -> (..., max(V, last marker id + 1)); ids without a row anywhere get minus infinity."""
        logits: Tensor = self.base_layer(hidden)
        markers = self._rows[0](hidden, as_head=True).to(logits.dtype)
        if self._follow_on_from == logits.shape[-1]:
            return torch.cat([logits, markers], dim=-1)  # the common case, with one copy instead of two
        if logits.shape[-1] < self._width:
            logits = F.pad(logits, (0, self._width - logits.shape[-1]), value=float("-inf"))
        return logits.index_copy(-1, self._ids(logits.device), markers)
