"""The axolotl plugin: hooks, wiring only."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin

from axolotl_mote.args import CHAIN_TYPE, MoteOptions, check_config
from axolotl_mote.host import (
    compile_layers,
    let_cpu_processes_meet,
    prepare_base,
    quantize_through_model_kwargs,
    zero3,
)
from axolotl_mote.steps import markers


class MotePlugin(BasePlugin):
    """Registers `adapter: mote`, the loss of chain data sets, and the marker tokens.

    Every hook looks at the configuration it is given: a run that uses neither `adapter: mote` nor chain data is left
    alone, even with the plugin loaded.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Check what validation would let through, and have axolotl add the marker tokens to the tokenizer."""
        self._debug = bool(cfg.get("debug"))  # a flag of the command line that validation drops
        if not _concerns(cfg):
            return
        options = MoteOptions(**(cfg.get("mote") or {}))
        if cfg.get("adapter") == "mote":
            check_config(cfg)
            quantize_through_model_kwargs(cfg)
            if cfg.get("torch_compile") and options.compile != "off":
                # Compiling layer by layer is as fast, starts sooner and never compiles the routing.
                cfg["torch_compile"] = False
                cfg["mote"] = {**(cfg.get("mote") or {}), "compile": "layers"}
        special = dict(cfg.get("special_tokens") or {})
        extra = list(special.get("additional_special_tokens") or [])
        special["additional_special_tokens"] = extra + [text for text in markers(options.steps) if text not in extra]
        cfg["special_tokens"] = special
        if cfg.get("inference"):
            cfg.setdefault("chat_template", "tokenizer_default")  # without one axolotl feeds the text as it is typed
        if cfg.get("dataset_prepared_path") and _chain_files(cfg):
            # axolotl knows a prepared data set by the file's name: chains that were built anew would not be noticed.
            cfg["dataset_prepared_path"] = str(Path(cfg["dataset_prepared_path"]) / _digest_of_chains(cfg))
        let_cpu_processes_meet(bool(cfg.get("deepspeed")))

    def get_input_args(self) -> str:
        """The schema of the `mote:` block."""
        return "axolotl_mote.args.MoteArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Make `adapter: mote` valid."""
        return [AdapterCapabilities(name="mote", lora_like=True, relora=False)]

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Check local chain files before axolotl reads them, so that faults name their rows."""
        from axolotl_mote.chain import check_file

        if getattr(self, "_debug", False):
            cfg.debug = True
        for path in _chain_files(cfg):
            if path.suffix in (".json", ".jsonl"):
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
        return {"trainable_token_indices": dict.fromkeys(names[:1] if tied else names, ids)}

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
        import torch
        from axolotl.loaders import load_tokenizer
        from axolotl.loaders.adapter import find_all_linear_names
        from peft import PeftModel

        from axolotl_mote.adapter import add_mote_adapter
        from axolotl_mote.chain import marker_ids, marker_words
        from axolotl_mote.config import MoteConfig

        options, tokenizer = _options(cfg), load_tokenizer(cfg)
        if model is not None:
            model.get_input_embeddings().num_embeddings = self._true_rows
            model = prepare_base(model, cfg, options.dropout_probabilities)
        targets = cfg.lora_target_modules or []
        if cfg.lora_target_linear and model is not None:
            targets = sorted({*([targets] if isinstance(targets, str) else targets), *find_all_linear_names(model)})
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
            config = _same_experts(model.peft_config["default"], config, cfg.lora_model_dir)
        else:
            # Loading the base model draws numbers, and not equally many under ZeRO-3: without this the fresh experts
            # would depend on how the run is launched.
            torch.manual_seed(cfg.seed or 0)
            model = add_mote_adapter(model, config, marker_words(tokenizer, options.steps), **kwargs)
        routing = model.base_model.routing
        routing.seed = cfg.seed or 0
        routing.step_dropout = options.dropout_probabilities
        model.base_model.chunked_loss = not zero3()
        model.print_trainable_parameters()
        return model, config

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Compile the decoder layers, where asked for or on CUDA."""
        if cfg.adapter != "mote" or cfg.inference:
            return
        wanted = _options(cfg).compile
        # ZeRO-3 hooks into every layer after this. Whether compiled layers bear it is untested: only when asked for.
        if wanted == "layers" or (wanted == "auto" and model.device.type == "cuda" and not zero3()):
            compile_layers(model, cfg)

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


def _chain_files(cfg: Any) -> list[Path]:
    """Local files of chains that a configuration names."""
    entries = [*(cfg.get("datasets") or []), *(cfg.get("test_datasets") or [])]
    paths = [Path(str(entry.get("path"))) for entry in entries if entry.get("type") == CHAIN_TYPE]
    return [path for path in paths if path.is_file()]


def _digest_of_chains(cfg: Any) -> str:
    digest = hashlib.sha256()
    for path in _chain_files(cfg):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _same_experts(trained: Any, config: Any, folder: str) -> Any:
    """The configuration of a loaded adapter; what the YAML says otherwise would be ignored, so it is an error."""
    names = ("steps", "marker_ids", "r", "lora_alpha", "expert_weight", "question_routing")
    for name in names:
        theirs, ours = getattr(trained, name), getattr(config, name)
        if theirs != ours:
            key = {"r": "lora_r", "lora_alpha": "lora_alpha", "marker_ids": "tokenizer"}.get(name, f"mote.{name}")
            raise ValueError(
                f"{key} must be that of the adapter in {folder}, {theirs}; got {ours}. "
                "Copy it from its adapter_config.json; the tokenizer is set with tokenizer_config: its folder."
            )
    return trained


def _options(cfg: Any) -> MoteOptions:
    """The `mote:` block of a validated configuration."""
    block = cfg.get("mote") or {}
    if isinstance(block, MoteOptions):
        return block
    return MoteOptions(**(block.to_dict() if hasattr(block, "to_dict") else dict(block)))
