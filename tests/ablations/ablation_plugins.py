"""axolotl plugins of the baselines: `mixture:` with `adapter: lora`, and marker rows that begin as MoTE's do."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.integrations.base import BasePlugin


class MixturePlugin(BasePlugin):
    """Turns the plain LoRA of `adapter: lora` into a token-level mixture of experts; see ``mixture``."""

    def get_input_args(self) -> str:
        """Name of the schema that the plugin adds to axolotl's."""
        return "mixture.MixtureArgs"

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        """Add the routers."""
        from mixture import MixtureOptions, Routers

        options = MixtureOptions(**(cfg.mixture or {}))
        # The loss of a window is a mean over its tokens, so each of its micro-batches adds its share.
        balance = options.balance / (cfg.gradient_accumulation_steps or 1)
        Routers(model, options.experts, balance, cfg.seed or 0)


class SameMarkersPlugin(BasePlugin):
    """Has the marker rows of a plain LoRA begin where MoTE's begin; by itself axolotl draws them at random."""

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Overwrite the rows that axolotl has just added to the tables."""
        from axolotl.loaders import load_tokenizer

        from axolotl_mote.chain.codec import ChainCodec
        from axolotl_mote.training.args import read_options

        codec = ChainCodec(load_tokenizer(cfg), read_options(cfg).steps)
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            with torch.no_grad():
                for token, words in zip(codec.vocabulary.marker_ids, codec.marker_words(), strict=True):
                    layer.weight[token] = layer.weight[words].float().mean(0)
