"""Self-alignment data: the model writes its own reasoning chains.

    questions -> loop (asks, checks, extends the chain) -> journal -> chains.jsonl, rejected.jsonl, manifest.json

The modules and sub-packages, each importing only those before it:

    settings  the build file: its schema and its hash
    texts     questions, prompts, defects of generated text, verdicts
    clients   what answers a call: a local model or a server
    loop      the adaptive loop and its journal
    shards    a build split over many hosts
    output    data files, manifest, statistics
    run       drives the loop with clients and journal, then writes the output

It needs the extra ``build``. It imports neither torch nor transformers before a local model is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_mote.builder.run import BuildReport as BuildReport
    from axolotl_mote.builder.run import build as build
    from axolotl_mote.builder.settings import load_settings as load_settings

_EXPORTS = {"build": "run", "BuildReport": "run", "load_settings": "settings"}
__all__ = ["BuildReport", "build", "load_settings"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
