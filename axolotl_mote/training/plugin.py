"""The axolotl plugin: hooks, wiring only."""

from __future__ import annotations

import hashlib
import logging
import os
from glob import glob
from pathlib import Path
from typing import Any

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from filelock import FileLock

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import markers
from axolotl_mote.training.args import CHAIN_TYPE, MoteOptions, chain_entries, check, data_entries, read_options
from axolotl_mote.training.base_model import compile_layers, prepare_base, quantize_through_model_kwargs
from axolotl_mote.training.checkpoints import choose_checkpoint
from axolotl_mote.training.compat import (
    allow_embedding_resize,
    block_embedding_resize,
    enable_gloo_for_cpu_processes,
    encode_chains_with_token_columns,
    find_embedding_layers,
    find_linear_layers,
    gathered,
    name_full_disk_at_both_ends,
    save_whole_adapters,
    trains_alone_on_cpu,
    undo_patches,
    uses_fsdp,
    uses_zero3,
)
from axolotl_mote.training.hosts import check_hosts
from axolotl_mote.training.output import check_output
from axolotl_mote.training.template import fix_template

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")

LOG = logging.getLogger("axolotl.mote")  # below axolotl's logger, so that its handlers print it


class MotePlugin(BasePlugin):
    """Registers `adapter: mote`, the loss of chain data sets, and the marker tokens.

    Every hook reads the configuration it is given and changes nothing in a run that uses neither `adapter: mote` nor
    chain data. The plugin keeps no state between hooks: axolotl reuses one instance for several configurations.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Check what validation would accept, and have axolotl add the marker tokens to the tokenizer."""
        if not _uses_mote_or_chains(cfg):
            return
        options = MoteOptions(**(cfg.get("mote") or {}))
        check(cfg)
        if isinstance(cfg.get("output_dir"), str):  # axolotl refuses what is none
            check_output(Path(cfg["output_dir"]))
        if cfg.get("adapter") == "mote":
            if not cfg.get("inference"):
                _warn_of_plain_rows(cfg)
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
            cfg.setdefault("chat_template", "tokenizer_default")  # without one axolotl feeds the text as typed
        if cfg.get("chat_template_kwargs"):
            fix_template(cfg)
        if chain_entries(cfg):
            encode_chains_with_token_columns(CHAIN_TYPE)
            # axolotl identifies a prepared data set by file names and would reuse it for new content.
            prepared = cfg.get("dataset_prepared_path") or DEFAULT_DATASET_PREPARED_PATH
            cfg["dataset_prepared_path"] = str(Path(prepared) / _digest_of_chains(cfg))
        if cfg.get("fsdp_config"):
            save_whole_adapters()
        enable_gloo_for_cpu_processes(bool(cfg.get("deepspeed")))

    def on_config_validation_error(self, cfg: dict[str, Any]) -> None:
        """Leave nothing of a rejected configuration behind for the next one in this process."""
        undo_patches()

    def get_input_args(self) -> str:
        """Name of the schema that the plugin adds to axolotl's."""
        return "axolotl_mote.training.args.MoteArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Register `adapter: mote`."""
        return [AdapterCapabilities(name="mote", lora_like=True, relora=False)]

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Check local chain files before axolotl reads them, so that faults name their rows; once, not on all ranks."""
        entries = chain_entries(cfg)
        if not entries:
            return
        from axolotl_mote.training.dataset import Columns, check_file

        steps = read_options(cfg).steps
        files = [
            (path, Columns.of(entry))
            for entry in entries.values()
            for path in _named_paths(entry)
            if path.is_file() and path.suffix in (".json", ".jsonl")
        ]
        prepared = Path(cfg.dataset_prepared_path)  # named after the content of the files
        prepared.mkdir(parents=True, exist_ok=True)
        checked = hashlib.sha256(repr((steps, [(str(path.resolve()), columns) for path, columns in files])).encode())
        record = prepared / f"checked-{checked.hexdigest()[:12]}"
        with FileLock(record.with_suffix(".lock")):
            if not record.exists():
                for path, columns in files:
                    check_file(path, steps, columns)
                record.touch()

    def get_lora_config_kwargs(self, cfg: Any) -> dict[str, Any]:
        """For the plain LoRA baseline: have PEFT train the rows of the marker tokens."""
        if not _uses_mote_or_chains(cfg) or cfg.adapter == "mote":
            return {}
        ids = _codec(cfg).vocabulary.marker_ids
        return {"trainable_token_indices": dict.fromkeys(find_embedding_layers(cfg), ids)}

    def pre_model_load(self, cfg: Any) -> None:
        """Choose the checkpoint that the run resumes from, before axolotl takes the one with the highest number."""
        if _uses_mote_or_chains(cfg) and not cfg.inference:
            choose_checkpoint(cfg)
            name_full_disk_at_both_ends()

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Keep axolotl from resizing the embeddings: the rows of the markers are in the adapter."""
        if cfg.adapter == "mote":
            block_embedding_resize(model)
        elif _uses_mote_or_chains(cfg):
            import torch

            torch.manual_seed(cfg.seed or 0)  # axolotl draws the new rows next, and seeds only later

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """Add a fresh adapter, or load the one that `lora_model_dir` names."""
        if cfg.adapter != "mote":
            return None
        import torch
        from peft import PeftModel

        from axolotl_mote.model.adapter import add_mote_adapter
        from axolotl_mote.model.config import MoteConfig
        from axolotl_mote.model.origin import check_origin
        from axolotl_mote.training.selfcheck import self_check

        options, codec = read_options(cfg), _codec(cfg)
        if model is not None:
            allow_embedding_resize(model)
            model = prepare_base(model, cfg, options.dropout_probabilities)
        targets = cfg.lora_target_modules or []
        if cfg.lora_target_linear and model is not None:
            targets = sorted({*([targets] if isinstance(targets, str) else targets), *find_linear_layers(model)})
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
            marker_ids=codec.vocabulary.marker_ids,
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
            config = check_trained_config(model.peft_config["default"], config, cfg.lora_model_dir)
            if uses_zero3():  # nothing could be read while the adapter was added
                name = config.base_model_name_or_path
                check_origin(model.get_base_model(), config.base_sample, name, config.marker_ids, gathered)
        else:
            # Loading the base model draws random numbers, and not equally many under ZeRO-3. Without a seed the fresh
            # experts would depend on how the run is launched.
            torch.manual_seed(cfg.seed or 0)
            model = add_mote_adapter(model, config, codec.marker_words(), gathered=gathered, **kwargs)
        routing = model.base_model.routing
        routing.seed = cfg.seed or 0
        routing.step_dropout = options.dropout_probabilities
        model.base_model.gathered = gathered if uses_zero3() else None
        model.print_trainable_parameters()
        self_check(cfg, model, bool(inference or cfg.inference))
        return model, config

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Compile the decoder layers, if configured or on CUDA."""
        if cfg.adapter != "mote" or cfg.inference:
            return
        wanted = read_options(cfg).compile
        # Both hook into every layer after this, untested with layers compiled on CUDA: `auto` leaves them alone.
        hooked = uses_zero3() or uses_fsdp()
        if wanted == "layers" or (wanted == "auto" and model.device.type == "cuda" and not hooked):
            compile_layers(model, cfg)

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """Never evaluate under `eval_strategy: "no"`, and train in bf16 on the CPU too."""
        if not _uses_mote_or_chains(cfg):
            return None
        arguments = {}
        if cfg.eval_strategy == "no":
            arguments["eval_on_start"] = False  # axolotl evaluates before the first step whatever the strategy
        if trains_alone_on_cpu(cfg):
            arguments["use_cpu"] = True  # axolotl has no key for it
            if cfg.activation_offloading not in (None, False, "hidden_states"):
                raise ValueError(
                    f"activation_offloading must not be set on the CPU; got {cfg.activation_offloading!r}. Remove it."
                )
        return arguments

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """The trainer with MoTE's loss, for `adapter: mote` and for chain data under another adapter."""
        if not _uses_mote_or_chains(cfg):
            return None
        from axolotl_mote.training.trainer import MoteTrainer

        attributes = {
            "vocabulary": _codec(cfg).vocabulary,
            "loss_weights": read_options(cfg).loss_weights,
            "write_card": staticmethod(lambda: self.post_train(cfg, None)),
        }
        return type("MoteTrainer", (MoteTrainer,), attributes)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Check that all hosts train on the same data, and that no other plugin has replaced the trainer.

        axolotl takes the first one it is given. Under ZeRO-3, the callback that runs the self-check.
        """
        if _uses_mote_or_chains(cfg):
            check_hosts(cfg)
            from axolotl_mote.training.trainer import MoteTrainer

            if not isinstance(trainer, MoteTrainer):
                raise ValueError(
                    f"plugins must not replace the trainer with chain data; got {type(trainer).__qualname__} of "
                    f"{type(trainer).__module__}. Remove the plugin that brings it."
                )
        if cfg.adapter == "mote":
            from axolotl_mote.training.selfcheck import callbacks

            return callbacks(cfg)
        return []

    def post_train(self, cfg: Any, model: Any) -> None:
        """Write the model card over axolotl's own, which it writes between the two calls of this hook.

        The adapter is saved between them too, so a card that cannot be written is only warned of.
        """
        folder = Path(cfg.output_dir)
        if cfg.adapter != "mote" or os.environ.get("RANK", "0") != "0" or not (folder / "adapter_config.json").exists():
            return
        from axolotl_mote.model.adapter import mote_model
        from axolotl_mote.model.config import MoteConfig
        from axolotl_mote.training.card import write_card

        # Not from the file where it can be helped: the first process of another node may be writing it again.
        tuner = None if model is None else mote_model(model)
        config = MoteConfig.from_pretrained(folder) if tuner is None else tuner.routing.config
        try:
            write_card(folder, cfg, config, read_options(cfg))
        except OSError as error:
            LOG.warning("The model card was not written: %s.", error)


def _uses_mote_or_chains(cfg: Any) -> bool:
    """Whether a configuration uses MoTE or chain data."""
    return cfg.get("adapter") == "mote" or bool(chain_entries(cfg))


def _warn_of_plain_rows(cfg: Any) -> None:
    """Warn of data sets without steps beside chain data."""
    chains = chain_entries(cfg)
    for where in data_entries(cfg):
        if where not in chains:
            LOG.warning(
                "%s is no chain data: all its tokens are routed as a question. Use type: %s.", where, CHAIN_TYPE
            )


def _codec(cfg: Any) -> ChainCodec:
    """The codec of a run: its tokenizer with the markers, and its steps."""
    from axolotl.loaders import load_tokenizer

    return ChainCodec(load_tokenizer(cfg), read_options(cfg).steps)


def _named_paths(entry: dict[str, Any]) -> list[Path]:
    """Local files and folders that an entry under `datasets:` names."""
    files = entry.get("data_files") or []
    named = [str(name) for name in [entry.get("path"), *([files] if isinstance(files, str) else files)] if name]
    found = [[name] if os.path.exists(name) else sorted(glob(name, recursive=True)) for name in named]
    return [Path(path) for paths in found for path in paths]


def _contents(path: Path) -> list[Path]:
    """A file, or the files below a folder, linked ones too, but for those that ``datasets.map`` leaves there."""
    if path.is_file():
        return [path]
    found: list[Path] = []
    for folder, below, names in os.walk(path, followlinks=True):
        above = [os.path.realpath(place) for place in Path(folder).parents if place.is_relative_to(path)]
        if os.path.realpath(folder) in above:  # a link back
            below.clear()
        else:
            found += [Path(folder, name) for name in names]
    files = [file for file in sorted(found) if file.is_file() and not file.name.startswith((".", "cache-"))]
    return [file for file in files if file.suffix or not file.name.startswith("tmp")]


def _digest_of_chains(cfg: Any) -> str:
    """Digest of what prepared chains depend on and axolotl does not look at: our code, and the content of files.

    Files are those of the data, of the tokenizer and of the chat template.
    """
    from axolotl_mote.training.dataset import code_digest

    digest = hashlib.sha256(code_digest().encode())
    paths = [path for entry in chain_entries(cfg).values() for path in _named_paths(entry)]
    tokenizer = Path(str(cfg.get("tokenizer_config") or cfg.get("base_model")))
    paths += [file for name in TOKENIZER_FILES for file in [tokenizer / name] if file.is_file()]
    template = str(cfg.get("chat_template_jinja") or "")
    paths += [Path(template)] if os.path.isfile(template) else []
    for path in paths:
        for file in _contents(path):
            digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]


def check_trained_config(trained: Any, config: Any, folder: str) -> Any:
    """The configuration of a loaded adapter, once the YAML agrees with it: other values would be ignored."""
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
