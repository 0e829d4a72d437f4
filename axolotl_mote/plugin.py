"""The axolotl plugin: hooks, wiring only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin

from axolotl_mote.args import MoteOptions, check_config
from axolotl_mote.steps import markers

CHAIN_TYPE = "axolotl_mote.chain"


class MotePlugin(BasePlugin):  # type: ignore[misc]
    """Registers `adapter: mote`, the loss of chain data sets, and the marker tokens.

    Every hook looks at the configuration it is given: a run that uses neither `adapter: mote` nor chain data is left
    alone, even with the plugin loaded.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Check what validation would let through, and have axolotl add the marker tokens to the tokenizer."""
        if cfg.get("adapter") == "mote":
            check_config(cfg)
        if not _concerns(cfg):
            return
        options = MoteOptions(**(cfg.get("mote") or {}))
        special = dict(cfg.get("special_tokens") or {})
        extra = list(special.get("additional_special_tokens") or [])
        special["additional_special_tokens"] = extra + [text for text in markers(options.steps) if text not in extra]
        cfg["special_tokens"] = special
        _let_cpu_processes_meet()

    def get_input_args(self) -> str:
        """The schema of the `mote:` block."""
        return "axolotl_mote.args.MoteArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Make `adapter: mote` valid."""
        return [AdapterCapabilities(name="mote", lora_like=True, relora=False)]

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Check local chain files before axolotl reads them, so that faults name their rows; axolotl then loads them."""
        from axolotl_mote.chain import check_file

        for entry in [*(cfg.datasets or []), *(cfg.test_datasets or [])]:
            path = Path(str(entry.get("path")))
            if entry.get("type") == CHAIN_TYPE and path.is_file() and path.suffix in (".json", ".jsonl"):
                check_file(path, _options(cfg).steps)

    def get_lora_config_kwargs(self, cfg: Any) -> dict[str, Any]:
        """For the plain LoRA baseline: train the marker tokens' rows through PEFT's own means."""
        if not _concerns(cfg) or cfg.adapter == "mote":
            return {}
        from axolotl.loaders import load_tokenizer
        from axolotl.loaders.utils import get_linear_embedding_layers, load_model_config

        from axolotl_mote.chain import marker_ids

        ids = marker_ids(load_tokenizer(cfg), _options(cfg).steps)
        model_config = load_model_config(cfg)
        names = get_linear_embedding_layers(model_config.model_type)
        tied = getattr(model_config, "tie_word_embeddings", False)
        return {"trainable_token_indices": {name: ids for name in (names[:1] if tied else names)}}

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Keep axolotl from resizing the embeddings: marker rows live in the adapter."""
        if cfg.adapter == "mote":
            embedding = model.get_input_embeddings()
            self._true_rows = embedding.num_embeddings
            # Only metadata to torch; axolotl compares it with the tokenizer's length. load_adapter puts it back.
            embedding.num_embeddings = 2**31

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """Add a fresh adapter, or load the one that `lora_model_dir` names."""
        if cfg.adapter != "mote":
            return None
        from axolotl.loaders import load_tokenizer
        from axolotl.loaders.adapter import find_all_linear_names
        from peft import PeftModel

        from axolotl_mote.adapter import add_mote_adapter, mote_model
        from axolotl_mote.chain import marker_ids, marker_words
        from axolotl_mote.config import MoteConfig

        if model is not None and hasattr(self, "_true_rows"):
            model.get_input_embeddings().num_embeddings = self._true_rows
        options, tokenizer = _options(cfg), load_tokenizer(cfg)
        targets = list(cfg.lora_target_modules or [])
        if cfg.lora_target_linear and model is not None:
            targets = sorted({*targets, *find_all_linear_names(model)})
        config = MoteConfig(
            r=cfg.lora_r,
            lora_alpha=cfg.lora_alpha or cfg.lora_r,
            lora_dropout=cfg.lora_dropout or 0.0,
            target_modules=targets,
            layers_to_transform=cfg.peft_layers_to_transform,
            layers_pattern=cfg.peft_layers_pattern,
            init_lora_weights=True if cfg.peft_init_lora_weights is None else cfg.peft_init_lora_weights,
            task_type="CAUSAL_LM",
            steps=options.steps,
            marker_ids=marker_ids(tokenizer, options.steps),
            expert_weight=options.expert_weight,
            question_routing=options.question_routing,
        )
        if config_only:
            return None, config
        kwargs = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            kwargs["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            serving = bool(inference or cfg.inference)
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not serving, **kwargs)
            config = model.peft_config["default"]
        else:
            model = add_mote_adapter(model, config, marker_words(tokenizer, options.steps), **kwargs)
        tuner = mote_model(model)
        assert tuner is not None
        tuner.routing.seed = cfg.seed or 0
        tuner.routing.step_dropout = options.dropout_probabilities
        model.print_trainable_parameters()
        return model, config

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """The trainer with MoTE's loss, for `adapter: mote` and for chain data under another adapter."""
        if not _concerns(cfg):
            return None
        from axolotl.loaders import load_tokenizer

        from axolotl_mote.chain import marker_ids
        from axolotl_mote.config import MoteConfig
        from axolotl_mote.trainer import MoteTrainer

        options = _options(cfg)
        ids = marker_ids(load_tokenizer(cfg), options.steps)
        attributes = {
            "chain_config": MoteConfig(steps=options.steps, marker_ids=ids),
            "loss_weights": options.loss_weights,
        }
        return type("MoteTrainer", (MoteTrainer,), attributes)


def _concerns(cfg: Any) -> bool:
    """Whether a configuration uses MoTE or chain data."""
    entries = [*(cfg.get("datasets") or []), *(cfg.get("test_datasets") or [])]
    return cfg.get("adapter") == "mote" or any(entry.get("type") == CHAIN_TYPE for entry in entries)


def _options(cfg: Any) -> MoteOptions:
    """The `mote:` block of a validated configuration."""
    block = cfg.get("mote") or {}
    if isinstance(block, MoteOptions):
        return block
    return MoteOptions(**(block.to_dict() if hasattr(block, "to_dict") else dict(block)))


def _let_cpu_processes_meet() -> None:
    """Let several processes on a machine without accelerator use gloo.

    accelerate leaves the back end empty there and then believes in a single process. Only such runs are touched.
    """
    import torch
    from accelerate.state import PartialState

    if torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    original = PartialState._prepare_backend
    if getattr(original, "_mote", False):
        return

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, distributed_type = original(self, *args, **kwargs)
        return backend or "gloo", distributed_type

    prepare_backend._mote = True  # type: ignore[attr-defined]
    PartialState._prepare_backend = prepare_backend
