"""The axolotl plugin: hooks, wiring only."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin

from axolotl_mote.args import MoteOptions, check_config
from axolotl_mote.steps import markers

LOG = logging.getLogger("axolotl.mote")  # below axolotl's logger, so that its handlers print it

CHAIN_TYPE = "axolotl_mote.chain"


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
            _quantize_through_model_kwargs(cfg)
            if cfg.get("torch_compile") and options.compile != "off":
                # Compiling layer by layer is as fast, starts sooner and never compiles the routing.
                cfg["torch_compile"] = False
                cfg["mote"] = {**(cfg.get("mote") or {}), "compile": "layers"}
        special = dict(cfg.get("special_tokens") or {})
        extra = list(special.get("additional_special_tokens") or [])
        special["additional_special_tokens"] = extra + [text for text in markers(options.steps) if text not in extra]
        cfg["special_tokens"] = special
        _let_cpu_processes_meet(bool(cfg.get("deepspeed")))

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

        if model is not None:
            model.get_input_embeddings().num_embeddings = self._true_rows
            model = _prepare_base(model, cfg)
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
            # Loading the base model draws numbers, and not equally many under ZeRO-3: without this the fresh experts
            # would depend on how the run is launched.
            torch.manual_seed(cfg.seed or 0)
            model = add_mote_adapter(model, config, marker_words(tokenizer, options.steps), **kwargs)
        routing = model.base_model.routing
        routing.seed = cfg.seed or 0
        routing.step_dropout = options.dropout_probabilities
        model.print_trainable_parameters()
        return model, config

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Compile the decoder layers, where asked for or on CUDA."""
        if cfg.adapter != "mote" or cfg.inference:
            return
        wanted = _options(cfg).compile
        if wanted == "layers" or (wanted == "auto" and model.device.type == "cuda"):
            for layer in model.get_base_model().get_decoder().layers:
                layer.compile(backend=cfg.torch_compile_backend or "inductor")
            LOG.info("mote.compile: compiled each decoder layer on its own")

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


def _quantize_through_model_kwargs(cfg: dict[str, Any]) -> None:
    """Hand 4-bit and 8-bit loading to transformers; axolotl does so for the adapters that it knows by name only."""
    if not (cfg.get("load_in_4bit") or cfg.get("load_in_8bit")):
        return
    if cfg.get("load_in_4bit"):
        compute = "bfloat16" if cfg.get("bf16") else "float16" if cfg.get("fp16") else "float32"
        quantization = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute,
            **(cfg.get("bnb_config_kwargs") or {}),
        }
    else:
        quantization = {"load_in_8bit": True}
    quantization["quant_method"] = "bitsandbytes"
    cfg["model_kwargs"] = {**(cfg.get("model_kwargs") or {}), "quantization_config": quantization}


def _prepare_base(model: Any, cfg: Any) -> Any:
    """Check the loaded base and choose its attention: refuse what is silently not as asked for."""
    import torch
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from axolotl_mote.attention import DENSE, check_attention, implementation_of

    if cfg.load_in_4bit or cfg.load_in_8bit:
        if getattr(model, "quantization_method", None) is None:
            key = "load_in_4bit" if cfg.load_in_4bit else "load_in_8bit"
            raise ValueError(f"{key} must quantize the base model; it was loaded in {model.dtype}. Remove the key.")
        if not is_deepspeed_zero3_enabled():
            from peft import prepare_model_for_kbit_training

            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(cfg.gradient_checkpointing))
    if any(_options(cfg).dropout_probabilities):
        if torch.cuda.is_available() and implementation_of(model.config) in DENSE:
            # A dense mask costs about half a training step more on a GPU; flex_attention costs nothing.
            LOG.info("mote.step_dropout: %s -> flex_attention", implementation_of(model.config))
            model.set_attn_implementation("flex_attention")
        check_attention(model.config)
        LOG.info("mote.step_dropout: hidden steps through %s", implementation_of(model.config))
    return model


def _let_cpu_processes_meet(deepspeed: bool) -> None:
    """Let several processes on a machine without accelerator train together, over gloo.

    accelerate leaves the back end empty there and then believes in a single process, and axolotl places the model of
    every process on the accelerator of its local rank. Only such runs are touched.
    """
    import torch
    from accelerate.state import DistributedType, PartialState

    if torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    prepare = PartialState._prepare_backend
    if getattr(prepare, "_mote", False):
        return
    from axolotl.loaders.model import ModelLoader

    place = ModelLoader._set_device_map_config

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, distributed_type = prepare(self, *args, **kwargs)
        # Without the type the processes would meet but no gradient be averaged.
        return (backend, distributed_type) if backend else ("gloo", DistributedType.MULTI_CPU)

    def set_device_map_config(self: Any) -> None:
        place(self)
        if "device_map" in self.model_kwargs:
            self.model_kwargs["device_map"] = {"": "cpu"}

    if deepspeed:
        from deepspeed.comm.torch import TorchBackend

        gather = TorchBackend.all_gather_into_tensor

        def all_gather_into_tensor(self: Any, output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
            # gloo copies through views of the output, which autograd forbids while ZeRO-1 and 2 gather parameters.
            return gather(self, output_tensor.detach(), input_tensor.detach(), *args, **kwargs)

        TorchBackend.all_gather_into_tensor = all_gather_into_tensor

    prepare_backend._mote = True  # type: ignore[attr-defined]
    PartialState._prepare_backend = prepare_backend
    ModelLoader._set_device_map_config = set_device_map_config
