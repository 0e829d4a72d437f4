"""Self-alignment data: the model writes its own reasoning chains.

    questions -> loop (asks, checks, grows the chain) -> journal -> chains.jsonl, rejected.jsonl, manifest.json

Every module here knows only the ones above it in this list::

    settings     the YAML file, its schema and its hash
    questions    JSONL, Parquet and Hugging Face data sets -> dialogues that end in a user turn
    hygiene      defects of generated text, foreign control tokens, near-duplicates
    prompts      Jinja2 templates -> chat messages
    verdict      text of the judge -> safe, unsafe, unparsed
    calls        what a client is asked and what it gives back
    loop         the adaptive loop, one generator per question; knows no client
    local        a transformers model in this process
    server       any OpenAI-compatible server
    journal      append-only record of every finished call
    run          drives loops with clients and journal, writes the results
    selfbleu, statistics, report   what the set looks like

It needs the extra ``build`` and imports neither torch nor transformers before a local model is used.
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
