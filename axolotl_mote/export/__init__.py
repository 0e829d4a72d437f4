"""From one step-routed adapter to plain parts that other software can load.

With hard routing and constant weights every step is exactly one plain LoRA: its own rank block and the shared one,
scaled. The modules, each importing only those before it:

    weights       which rank blocks make up a step; tensors in, tensors out
    folders       adapters and base model on disk
    verification  exported against step-routed logits; drift of re-prefilling
    api           export_adapter
    served        export_served: base and adapter for a server that routes by step
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_mote.export.api import ExportReport as ExportReport
    from axolotl_mote.export.api import export_adapter as export_adapter
    from axolotl_mote.export.served import ServedReport as ServedReport
    from axolotl_mote.export.served import export_served as export_served
    from axolotl_mote.export.weights import build_adapter as build_adapter
    from axolotl_mote.export.weights import plan_adapters as plan_adapters

_EXPORTS = {
    "export_adapter": "api",
    "ExportReport": "api",
    "export_served": "served",
    "ServedReport": "served",
    "plan_adapters": "weights",
    "build_adapter": "weights",
}

__all__ = ["ExportReport", "ServedReport", "build_adapter", "export_adapter", "export_served", "plan_adapters"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"axolotl_mote.export.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'axolotl_mote.export' has no attribute {name!r}")
