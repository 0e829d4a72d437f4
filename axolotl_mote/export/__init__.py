"""From one step-routed adapter to plain parts that other software understands.

With hard routing and constant weights every step is exactly one plain LoRA: its own rank block and the shared one,
scaled. The parts, each importing only those before it: ``weights`` (tensors in, tensors out), ``folders`` (adapters and
base model on disk), ``proof`` (exported against gated logits, drift of re-prefilling), ``api`` (`export_adapter`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {"export_adapter": "api", "ExportReport": "api", "plan_adapters": "weights", "build_adapter": "weights"}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"axolotl_mote.export.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'axolotl_mote.export' has no attribute {name!r}")
