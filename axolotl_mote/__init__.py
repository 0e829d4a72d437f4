"""MoTE (Mixture of insighTful Experts) as an axolotl plugin.

Importing this package imports neither torch nor axolotl; the names below are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "MotePlugin": "plugin",
    "MoteConfig": "config",
    "MoteModel": "adapter",
    "load_mote": "generation",
    "generate_chain": "generation",
    "Chain": "generation",
    "step_ids_from_tokens": "routing",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"axolotl_mote.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'axolotl_mote' has no attribute {name!r}")
