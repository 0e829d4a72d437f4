"""Compiling each decoder layer on its own: layers of a kind share one compilation, and routing stays outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from axolotl_mote.model.compat import decoder_layers, prepare_compilation, text_decoder


def compile_layers(
    model: PreTrainedModel,
    *,
    backend: Any = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    varying: bool = True,
    on_fallback: Callable[[str], None],
) -> None:
    """Compile every decoder layer of a model, with the experts in it.

    A layer that is compiled too often runs uncompiled from then on, and flex_attention in it unfused, holding T x T
    scores. So shapes are symbolic where batches differ in rows and length, and the limit is far above what is needed:
    at most four compilations for each kind of layer (training and evaluation, one row and several).

    Args:
        model: The model inside the adapter.
        backend: As for ``torch.compile``.
        mode: As for ``torch.compile``.
        options: As for ``torch.compile``.
        varying: Whether batches differ in shape. Fixed shapes compile to faster code.
        on_fallback: Called with torch's message if the limit is reached all the same.
    """
    prepare_compilation(on_fallback)
    for layer in decoder_layers(text_decoder(model)):
        layer.compile(
            backend=backend,
            mode=mode,
            options=None if options is None else dict(options),
            dynamic=True if varying else None,
        )
