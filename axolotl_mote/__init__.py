"""MoTE (Mixture of insighTful Experts) as an axolotl plugin.

Importing this package imports neither torch nor axolotl; the names below are loaded on first use. The rooms of the
package, each importing only those before it:

    versions     the versions of other packages that this one was tested with
    files        JSON lines, atomic writes, the append-only log
    schema       YAML files of users, checked by a pydantic schema
    report       one self-contained HTML page: plots, tables, light and dark
    chain        the language of chains: steps, vocabulary, codec, row checks
    model        the step-routed LoRA: torch, transformers and peft
    training     axolotl: plugin, options, trainer, data sets
    generation   questions to chains
    export       one adapter to plain PEFT adapters, or to a folder for a server
    benchmarks   evaluation prompts by name; what training must not contain
    builder      chain data sets that a model writes itself
    evaluation   benchmark tasks, judges, comparisons, the report
    serving      a vLLM plugin that routes by step inside the engine
    doctor       proofs on the user's own model, data and configuration
    cli          the commands
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from axolotl_mote.chain.codec import ChainCodec as ChainCodec
    from axolotl_mote.chain.result import Chain as Chain
    from axolotl_mote.chain.vocabulary import StepVocabulary as StepVocabulary
    from axolotl_mote.generation.api import generate_chain as generate_chain
    from axolotl_mote.generation.loading import load_mote as load_mote
    from axolotl_mote.model.adapter import MoteModel as MoteModel
    from axolotl_mote.model.adapter import add_mote_adapter as add_mote_adapter
    from axolotl_mote.model.config import MoteConfig as MoteConfig
    from axolotl_mote.model.routing import step_ids_from_tokens as step_ids_from_tokens
    from axolotl_mote.training.plugin import MotePlugin as MotePlugin

__version__ = "0.1.0"

_EXPORTS = {
    "MotePlugin": "training.plugin",
    "MoteConfig": "model.config",
    "MoteModel": "model.adapter",
    "add_mote_adapter": "model.adapter",
    "step_ids_from_tokens": "model.routing",
    "ChainCodec": "chain.codec",
    "StepVocabulary": "chain.vocabulary",
    "Chain": "chain.result",
    "load_mote": "generation.loading",
    "generate_chain": "generation.api",
}

__all__ = [
    "Chain",
    "ChainCodec",
    "MoteConfig",
    "MoteModel",
    "MotePlugin",
    "StepVocabulary",
    "add_mote_adapter",
    "generate_chain",
    "load_mote",
    "step_ids_from_tokens",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        if not _EXPORTS[name].startswith("chain."):
            import_module("peft")  # before any module of ours: threads then take the import locks in one order
        return getattr(import_module(f"axolotl_mote.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'axolotl_mote' has no attribute {name!r}")


def _register_peft_type(_: Any) -> None:
    import_module("axolotl_mote.model.adapter")


# PEFT has no entry point for types that live outside of it. With the hook, `import axolotl_mote` is enough for
# PeftModel.from_pretrained, before or after `import peft`, and the commands that need no model never import torch.
register_post_import_hook(_register_peft_type, "peft")
