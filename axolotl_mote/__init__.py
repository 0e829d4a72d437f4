"""MoTE (Mixture of insighTful Experts) as an axolotl plugin.

Importing this package imports neither torch nor axolotl; the names below are loaded on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "MotePlugin": "plugin",
    "MoteConfig": "config",
    "MoteModel": "adapter",
    "add_mote_adapter": "adapter",
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


class _AfterPeft(MetaPathFinder, Loader):
    """Registers the PEFT type MOTE as soon as peft is imported, so that importing this package costs nothing.

    Where it is our own configuration that imports peft first, registering waits until that module is complete.
    """

    def __init__(self) -> None:
        self._waiting = {"peft", "axolotl_mote.config"}
        self._loaders: dict[str, Loader] = {}

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self._waiting:
            return None
        self._waiting.remove(name)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            self._loaders[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__loader__ = loader = self._loaders.pop(name)
        loader.exec_module(module)
        if name != "peft" or "axolotl_mote.config" not in sys.modules:
            import_module("axolotl_mote.adapter")


if "peft" in sys.modules:
    import_module("axolotl_mote.adapter")
else:
    sys.meta_path.insert(0, _AfterPeft())
