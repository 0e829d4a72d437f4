"""`Session`: a run's configuration, data, model and trainer, read as `axolotl train` reads them.

Every run of the doctor is the user's YAML file with some keys replaced, written to a temporary folder and read from
there. What is expensive is read once, and what failed is not tried again. No checks.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import yaml
from torch import Tensor

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.doctor.lines import NotTestedError
from axolotl_mote.doctor.memory import Memory, measure
from axolotl_mote.model.adapter import MoteModel, mote_model
from axolotl_mote.training.args import read_options
from axolotl_mote.training.selfcheck import precision

T = TypeVar("T")

SHARDING = ("deepspeed", "fsdp_config", "fsdp_version", "fp32_norms", "fp32_norm_classes")
"""Keys that have several processes share the parameters; one process alone cannot have them."""

# What reports to others, evaluates, stops early or continues an older run.
_REMOVED = (
    *SHARDING,
    *("test_datasets", "eval_strategy", "eval_steps", "evals_per_epoch", "eval_sample_packing", "saves_per_epoch"),
    *("save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end", "metric_for_best_model"),
    *("early_stopping_patience", "generate_samples", "do_causal_lm_eval", "resume_from_checkpoint"),
    *("auto_resume_from_checkpoints", "hub_model_id", "hub_strategy", "push_to_hub", "use_ray", "max_steps"),
    *("batch_size", "profiler_steps", "use_tensorboard", "val_set_size"),
    *("dp_shard_size", "dp_replicate_size"),
)
_REPORTERS = ("wandb", "mlflow", "comet", "trackio", "swanlab", "otel", "gradio")

# Adam divides by the root of the second moment: with a small eps, an element whose gradient is rounding moves as far as
# any other, and no two orders of summation agree. With this one the update is proportional to the gradient.
COMPARABLE: dict[str, Any] = {
    "optimizer": "adamw_torch",
    "optim_args": None,
    "adam_epsilon": 0.01,
    "learning_rate": 0.003,
    "lr_scheduler": "constant",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "warmup_ratio": None,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,  # it would hide a wrong scale
    "lora_dropout": 0.0,
    "neftune_noise_alpha": None,
    "loraplus_lr_ratio": None,
    "embedding_lr": None,
    "lr_groups": None,
    "group_by_length": None,
    # Batches are put together by each process on its own.
    "sample_packing": False,
    "pad_to_sequence_len": None,
}
"""Keys of runs that are compared with each other: their optimizer must not amplify rounding."""


@dataclass
class TrainedRun:
    """What a short run left.

    Args:
        folder: Its output folder.
        before: The adapter's tensors when it began, by their names in the file.
        after: Those when it ended.
        losses: Logged loss of every step.
        seconds: Time of the steps.
        tokens: Tokens of the micro-batches, padding included.
        seen: Different tokens in them.
        memory: Sizes, if they were asked for.
        peak: Most bytes allocated on the GPU; 0 without one.
        device: Where it ran.
    """

    folder: Path
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    losses: list[float]
    seconds: float
    tokens: int
    seen: set[int]
    memory: Memory | None
    peak: int
    device: str


class Session:
    """One call of the doctor.

    Args:
        config: The user's YAML file.
        folder: An existing empty folder, which takes everything that is written.
        steps: Optimizer steps of a short run, at least 2.
        processes: Processes that train together; 1 for none.

    Raises:
        ValueError: If the file holds no mapping.
        ModuleNotFoundError: If axolotl is not installed.
    """

    def __init__(self, config: Path, folder: Path, steps: int = 4, processes: int = 2) -> None:
        if find_spec("axolotl") is None:
            raise ModuleNotFoundError("No module named 'axolotl'", name="axolotl")
        os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")  # these runs are no trainings to count
        self.config, self.folder, self.steps, self.processes = config, folder, steps, processes
        self.environment = dict(os.environ)  # of launched processes: before axolotl adds to it
        self.gpus = torch.cuda.device_count()  # does not start CUDA
        if self.gpus > 1:  # this process is one of several: it takes one of them
            first = self.environment.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
            os.environ["CUDA_VISIBLE_DEVICES"] = first
        raw = yaml.safe_load(config.read_text(encoding="utf-8"))
        if not isinstance(raw, Mapping):
            raise ValueError(
                f"CONFIG must be a mapping of keys; got {type(raw).__name__} at {config}. Give a YAML file."
            )
        self.raw: dict[str, Any] = dict(raw)
        self._known: dict[str, Any] = {}

    @property
    def sharding(self) -> tuple[str, str] | None:
        """The key of the configuration that has several processes share the parameters, and what does it."""
        known = {"deepspeed": "DeepSpeed", "fsdp_config": "FSDP2"}
        return next(((key, name) for key, name in known.items() if self.raw.get(key)), None)

    # --- read once ----------------------------------------------------------------------------------------------------

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gave at its first call.

        Raises:
            NotTestedError: If that call failed; the line that made it has the error.
        """
        if name not in self._known:
            self._known[name] = None
            self._known[name] = make()
        if self._known[name] is None:
            raise NotTestedError(f"needs the {name}, which failed")
        return cast(T, self._known[name])

    def forget(self, name: str) -> None:
        """Free what is known, such as a model; it is made again when it is asked for."""
        self._known.pop(name, None)
        gc.collect()  # a trainer and its model refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def validated(self) -> Any:
        """The user's configuration as axolotl validates it, all keys as they are."""
        return self.once("configuration", self._validate)

    @property
    def cfg(self) -> Any:
        """The configuration of the model that is tested: eager, evaluated by nobody, in one process."""
        _ = self.validated
        return self.once("checked configuration", lambda: self.load("checks", self.eager()))

    @property
    def data(self) -> Any:
        """axolotl's training data for `cfg`."""
        return self.once("data", lambda: self.read_data(self.cfg))

    @property
    def built(self) -> tuple[Any, Any, Any]:
        """Trainer, model and tokenizer, as axolotl builds them; nothing is trained yet."""
        return self.once("model", lambda: self._build(self.cfg, self.data))

    @property
    def trainer(self) -> Any:
        """The trainer."""
        return self.built[0]

    @property
    def tuner(self) -> MoteModel:
        """The MoTE model in the trainer."""
        tuner = mote_model(self.built[1])
        if tuner is None:
            raise NotTestedError("needs adapter: mote")
        return tuner

    @property
    def codec(self) -> ChainCodec:
        """The codec of the run."""
        return self.once("tokenizer", self._read_codec)

    @property
    def options(self) -> Any:
        """The `mote:` block."""
        return read_options(self.validated)

    # --- how tensors are compared -------------------------------------------------------------------------------------

    def precision(self) -> Any:
        """The precision that training runs in."""
        return precision(self.cfg, self.tuner.model)

    @property
    def exact(self) -> bool:
        """Whether training runs in float32."""
        half = self.cfg.bf16 or self.cfg.fp16 or self.tuner.model.dtype != torch.float32
        return not half and torch.get_float32_matmul_precision() == "highest"

    @property
    def exact_run(self) -> bool:
        """Whether runs that are compared train in float32."""
        half = self.cfg.bf16 or self.cfg.fp16
        return not torch.cuda.is_available() or not (half or torch.get_float32_matmul_precision() != "highest")

    # --- configurations -----------------------------------------------------------------------------------------------

    def eager(self) -> dict[str, Any]:
        """Keys that leave layers uncompiled, so that they can be looked into; the self-check has a line of its own."""
        mote = {**(self.raw.get("mote") or {}), "compile": "off", "self_check": False}
        return {"mote": mote, "torch_compile": None}

    def comparable(self) -> dict[str, Any]:
        """Keys of runs that are compared with each other; on the CPU in float32, as several processes have to be."""
        precise = {} if torch.cuda.is_available() else {"bf16": False, "fp16": False, "tf32": False}
        return {**COMPARABLE, **self.eager(), **precise}

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step: as configured, at most 2."""
        return min(2, int(self.validated.gradient_accumulation_steps or 2))

    def write(self, name: str, changes: Mapping[str, Any]) -> Path:
        """Write the YAML file of a run; a change to None removes the key."""
        kept = {key: value for key, value in self.raw.items() if not key.removeprefix("use_").startswith(_REPORTERS)}
        raw = {
            **kept,
            **dict.fromkeys(_REMOVED),
            "output_dir": str(self.folder / name),
            "dataset_prepared_path": str(self.folder / "prepared"),
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": self.steps,
            "gradient_accumulation_steps": self.accumulation,
            **changes,
        }
        file = self.folder / f"{name}.yml"
        raw = {key: value for key, value in raw.items() if value is not None}
        file.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
        return file

    def load(self, name: str, changes: Mapping[str, Any]) -> Any:
        """axolotl's configuration of a run."""
        from axolotl.cli.config import load_cfg

        return load_cfg(str(self.write(name, changes)))

    def read_data(self, cfg: Any) -> Any:
        """axolotl's data for a configuration; encoded once, as all runs share a folder."""
        from axolotl.common.datasets import load_datasets
        from axolotl.integrations.base import PluginManager

        with self.no_caching():
            PluginManager.get_instance().load_datasets(cfg, preprocess=False)
            return load_datasets(cfg=cfg)

    @contextmanager
    def no_caching(self) -> Iterator[None]:
        """Keep ``datasets`` from writing its caches beside the user's data."""
        import datasets

        enabled = datasets.is_caching_enabled()
        datasets.disable_caching()
        try:
            yield
        finally:
            if enabled:
                datasets.enable_caching()

    def _validate(self) -> Any:
        from axolotl.cli.config import gpu_capabilities, prepare_plugins
        from axolotl.integrations.base import PluginManager
        from axolotl.utils.config import validate_config
        from axolotl.utils.dict import DictDefault

        cfg = DictDefault(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        if cfg.adapter != "mote" or not cfg.plugins:
            raise ValueError(
                f"adapter must be mote, and plugins hold axolotl_mote.MotePlugin; got adapter {cfg.adapter!r} and "
                f"plugins {cfg.plugins}. Add both."
            )
        prepare_plugins(cfg)
        capabilities, env_capabilities = gpu_capabilities()
        try:
            return validate_config(cfg, capabilities=capabilities, env_capabilities=env_capabilities)
        except Exception:
            PluginManager.get_instance().on_config_validation_error(cfg)  # as axolotl does
            raise

    def _read_codec(self) -> ChainCodec:
        from axolotl.loaders import load_tokenizer

        return ChainCodec(load_tokenizer(self.cfg), self.options.steps)

    def _build(self, cfg: Any, data: Any) -> tuple[Any, Any, Any]:
        from axolotl.train import setup_model_and_trainer

        trainer, model, tokenizer, _, _ = setup_model_and_trainer(cfg, data)
        return trainer, model, tokenizer

    # --- short runs ---------------------------------------------------------------------------------------------------

    def train(
        self, name: str, changes: Mapping[str, Any], resume: Path | None = None, measured: bool = False
    ) -> TrainedRun:
        """Train a few steps in this process, as `axolotl train` does, and save.

        Args:
            name: Of the run.
            changes: Keys that differ from the user's.
            resume: Checkpoint to continue.
            measured: Measure memory first; it draws random numbers.
        """
        from axolotl.train import execute_training, save_trained_model

        self.forget("model")  # room for another one
        cfg = self.load(name, changes)
        trainer, model, tokenizer = self._build(cfg, self.read_data(cfg))
        memory, before = measure(trainer) if measured else None, adapter_tensors(model)
        counted = _TokenCounter(trainer)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        execute_training(cfg, trainer, None if resume is None else str(resume))
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        folder = Path(cfg.output_dir)
        save_trained_model(cfg, trainer, model)
        tokenizer.save_pretrained(folder)
        losses = [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]
        device = str(next(model.parameters()).device)
        return TrainedRun(
            folder, before, adapter_tensors(model), losses, seconds, counted.tokens, counted.seen, memory, peak, device
        )


class _TokenCounter:
    """Counts the tokens of the micro-batches that a trainer computes a loss of."""

    def __init__(self, trainer: Any) -> None:
        self.tokens, self.seen = 0, set[int]()
        compute = trainer.compute_loss

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.tokens += inputs["input_ids"].numel()
            self.seen |= set(inputs["input_ids"].unique().tolist())
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = counted


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """Copies of an adapter's tensors on the CPU, by their names in adapter_model.safetensors."""
    named = model.named_parameters()
    return {name.replace(".default", ""): p.detach().cpu().clone() for name, p in named if "lora_" in name}
