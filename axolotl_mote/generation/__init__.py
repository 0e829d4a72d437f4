"""From questions to chains: the step grammar, the three modes, streaming.

The modules, each importing only those before it:

    grammar    which token may come next, so that every chain is valid
    streamer   the text of each step while it is generated
    folder     an adapter's folder: its configuration and tensors, checked
    loading    load_mote; the codec that fits a model
    decoding   one batch of prompts to one batch of chains
    verify     add reasoning steps until the answer is judged safe
    api        generate_chain
    answers    files of questions to files of answers; no torch
    runner     a file of questions, answered in several modes

The model routes its tokens itself: nothing here deals with experts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_mote.generation.api import generate_chain as generate_chain
    from axolotl_mote.generation.grammar import StepGrammar as StepGrammar
    from axolotl_mote.generation.loading import codec_for as codec_for
    from axolotl_mote.generation.loading import load_mote as load_mote
    from axolotl_mote.generation.streamer import StepStreamer as StepStreamer

_EXPORTS = {
    "load_mote": "loading",
    "codec_for": "loading",
    "generate_chain": "api",
    "StepGrammar": "grammar",
    "StepStreamer": "streamer",
}

__all__ = ["StepGrammar", "StepStreamer", "codec_for", "generate_chain", "load_mote"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"axolotl_mote.generation.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'axolotl_mote.generation' has no attribute {name!r}")
