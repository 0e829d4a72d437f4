"""From questions to chains: step grammar, the three modes, parsing, streaming.

The parts, each importing only those before it: ``vocabulary`` (which ids are markers), ``grammar`` (which token may
come next), ``result`` (what came out), ``streamer`` (showing it while it comes), ``decoding`` (one batch), ``verify``
(lengthen until judged safe), ``api`` (`generate_chain`), ``loading`` (`load_mote`), ``jsonl`` (files, no torch).
Nothing here knows how experts are routed: the model derives that from the tokens.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "load_mote": "loading",
    "generate_chain": "api",
    "Chain": "result",
    "parse_chain": "result",
    "StepGrammar": "grammar",
    "StepVocabulary": "vocabulary",
    "step_vocabulary": "vocabulary",
    "StepStreamer": "streamer",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"axolotl_mote.generation.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'axolotl_mote.generation' has no attribute {name!r}")
