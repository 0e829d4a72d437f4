"""Every patch of axolotl, accelerate and DeepSpeed, and every private name of theirs that training uses.

Each entry names what it works around and where that stands upstream. tests/training/test_training_compat.py fails when
an upstream name or signature changes. Tested with axolotl 0.19.0 and 0.21.0, accelerate 1.13.0 and 1.15.0, DeepSpeed
0.18.9.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from axolotl_mote.training.output import full_disk_named, share_weights
from axolotl_mote.versions import private_names

# --- axolotl: loading -----------------------------------------------------------------------------------------------


def block_embedding_resize(model: nn.Module) -> None:
    """Keep axolotl from resizing the embeddings for the marker tokens; ``allow_embedding_resize`` undoes it.

    Works around: axolotl resizes whenever ``num_embeddings`` is less than the tokenizer's length and has no option
    against it. To torch the field is only metadata.
    Upstream: axolotl/loaders/model.py, ``ModelLoader._resize_token_embeddings``.
    """
    model.get_input_embeddings().num_embeddings = 2**31  # type: ignore[operator]


def allow_embedding_resize(model: nn.Module) -> None:
    """Restore the true number of embeddings, also where DeepSpeed ZeRO-3 has partitioned the table."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    embedding.num_embeddings = getattr(embedding.weight, "ds_shape", embedding.weight.shape)[0]


def find_linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that ``lora_target_linear: true`` means.

    Works around: axolotl resolves the option for adapters that it knows by name only.
    Upstream: axolotl/loaders/adapter.py.
    """
    with private_names():
        from axolotl.loaders.adapter import find_all_linear_names

    names: list[str] = find_all_linear_names(model)
    return names


def find_embedding_layers(cfg: Any) -> list[str]:
    """Names of the layers that hold a row per token: the input embedding, and the LM head unless it is tied to it.

    Works around: PEFT trains token rows of layers that are named; only axolotl has a table of names by model type.
    Upstream: axolotl/loaders/utils.py.
    """
    with private_names():
        from axolotl.loaders.utils import get_linear_embedding_layers, load_model_config

    config = load_model_config(cfg)
    names: list[str] = get_linear_embedding_layers(config.model_type)
    return names[:1] if getattr(config, "tie_word_embeddings", False) else names


def uses_zero3() -> bool:
    """Whether DeepSpeed ZeRO-3 partitions the parameters, or will once training starts.

    Works around: the engine does not exist while the model is loaded. axolotl tells accelerate through this variable.
    Upstream: axolotl/utils/trainer.py, ``setup_deepspeed_env``.
    """
    return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def uses_fsdp() -> bool:
    """Whether FSDP2 shards the parameters, or will once training starts.

    Works around: the model is sharded when the trainer begins. axolotl tells accelerate through this variable.
    Upstream: axolotl/utils/trainer.py, ``setup_fsdp_envs``.
    """
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


@contextmanager
def gathered(parameter: Tensor) -> Iterator[None]:
    """Make a parameter that DeepSpeed ZeRO-3 has partitioned readable; any other parameter stays as it is.

    Works around: there is no public test for a partitioned parameter.
    Upstream: deepspeed/runtime/zero/partition_parameters.py, ``ds_id``.
    """
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter):
        yield


def local_values(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, but a part under FSDP2 and DeepSpeed ZeRO-3.

    Works around: there is no public name for the part, nor for the end of its values.
    Upstream: deepspeed/runtime/zero/partition_parameters.py, ``ds_tensor``, ``ds_numel``, ``ds_process_group``.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    part: Tensor | None = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    rank = dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    own = min(part.numel(), parameter.ds_numel - rank * part.numel())  # type: ignore[attr-defined]
    return part.detach().flatten()[: max(own, 0)]  # behind it is padding, whatever memory held there


def encode_chains_with_token_columns(chain_type: str) -> None:
    """Have axolotl encode chain data that also has the columns of tokenized rows; ``undo_patches`` reverts it.

    Works around: axolotl takes rows with `input_ids`, `attention_mask` and `labels` as they are, whatever their type.
    Upstream: axolotl/utils/data/wrappers.py, ``get_dataset_wrapper``, as axolotl/utils/data/sft.py calls it.

    Args:
        chain_type: The `type` of chain data.
    """
    with private_names():
        from axolotl.utils.data import sft

        wrap = sft.get_dataset_wrapper

    def get_dataset_wrapper(*, dataset_config: Any, dataset: Any, **options: Any) -> Any:
        if dataset_config.type == chain_type:
            taken = {"input_ids", "attention_mask", "labels"} & set(dataset.column_names)
            dataset = dataset.remove_columns(sorted(taken))
        return wrap(dataset_config=dataset_config, dataset=dataset, **options)

    _patch(sft, "get_dataset_wrapper", get_dataset_wrapper)


# --- transformers' trainer, as axolotl builds on it -----------------------------------------------------------------


class OwnLoss:
    """Mixin for a trainer that computes its own loss: the base class runs the model and leaves the loss alone.

    Works around: the item count and the scaling of the loss differ between versions. axolotl 0.19 averages over
    micro-batches, axolotl 0.21 counts labels, and both divide by the accumulation steps unless a loss function is set.
    Upstream: transformers/trainer.py, ``Trainer.compute_loss``, ``training_step``, ``_get_num_items_in_batch``;
    axolotl/core/trainers/base.py, ``AxolotlTrainer._get_num_items_in_batch``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compute_loss_func = _no_loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        """Count nothing: training counts in ``get_batch_samples``, and evaluation counts each batch alone.

        Ranks may evaluate different numbers of batches, so a count over ranks would leave some waiting.
        """

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """What axolotl does to a batch before the forward, the forward, and its output."""
        return super().compute_loss(model, inputs, return_outputs=True)[1]  # type: ignore[misc]


def _no_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return labels.new_zeros(())


class NamedFullDisk:
    """Mixin for a trainer: a checkpoint that finds no room says so.

    Works around: transformers, tokenizers, safetensors and torch each raise an error of their own, without a path.
    Upstream: transformers/trainer.py, ``Trainer._save_checkpoint``.
    """

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        with full_disk_named(Path(self.args.output_dir, folder)):  # type: ignore[attr-defined]
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]


def name_full_disk_at_both_ends() -> None:
    """Have axolotl say so too where it saves itself: the configuration first, the adapter last.

    ``undo_patches`` reverts it. The adapter gets the rights of its configuration.
    Works around: the trainer takes no part in either.
    Upstream: axolotl/train.py, ``save_initial_configs`` and ``save_trained_model``.
    """
    with private_names():
        from axolotl import train

        saves = {name: getattr(train, name) for name in ("save_initial_configs", "save_trained_model")}

    def named(save: Callable[..., None]) -> Callable[..., None]:
        @wraps(save)
        def run(cfg: Any, *args: Any, **kwargs: Any) -> None:
            with full_disk_named(Path(cfg.output_dir)):
                save(cfg, *args, **kwargs)
            share_weights(Path(cfg.output_dir))

        return run

    for name, save in saves.items():
        _patch(train, name, named(save))


class WholeAdapters:
    """Mixin for a trainer: under FSDP2 a checkpoint holds the whole adapter, and is resumed from it.

    Works around: transformers gathers the base model with the adapter to save the adapter, and not at all where the
    state is sharded; of a full state it keeps the first process's part to resume from.
    Upstream: transformers/trainer.py, ``Trainer.save_model``, ``_load_from_checkpoint``, ``_load_best_model``;
    accelerate/utils/fsdp_utils.py, ``save_fsdp_model``.
    """

    model: nn.Module
    accelerator: Any
    is_fsdp_enabled: bool

    def check_fsdp(self) -> None:
        """Check what shards the model, however it was launched, and have it sum gradients in float32.

        Works around: accelerate averages them in the type of the computation, and casts what each layer gives to it.
        Upstream: accelerate/utils/dataclasses.py, ``FullyShardedDataParallelPlugin.set_mixed_precision``.

        Raises:
            ValueError: If it is FSDP1.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"fsdp_version must be 2 with chain data; got {plugin.fsdp_version} from the launcher. FSDP1 is not "
                "supported. Set fsdp_version: 2 and fsdp_config in the YAML file."
            )
        if plugin.mixed_precision_policy is not None:
            import torch

            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a model that training has sharded.

        Raises:
            ValueError: If nothing has: accelerate shards a model only together with its optimizer.
        """
        if self.is_fsdp_enabled and not is_sharded(self.model):
            raise ValueError(
                "fsdp_config must not be set to evaluate alone; got it, and a model that no training has sharded. "
                "Remove fsdp_config and fsdp_version for `axolotl evaluate`."
            )
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; every process must call it."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        state = whole_adapter(self.model)
        if self.args.should_save:  # type: ignore[attr-defined]
            self._save(output_dir, state_dict=state)  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            self._check_optimizer_file(resume_from_checkpoint)
            load_whole_adapter(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            load_whole_adapter(self.model, self.state.best_model_checkpoint)  # type: ignore[attr-defined]
        else:
            super()._load_best_model()  # type: ignore[misc]

    def _check_optimizer_file(self, folder: str) -> None:
        kind = str(self.accelerator.state.fsdp_plugin.state_dict_type)
        wanted = "optimizer.bin" if "FULL" in kind else "optimizer_0"
        found = sorted(path.name for path in Path(folder).glob("optimizer*"))
        if found and wanted not in found:  # none: the checkpoint was saved without, on purpose
            raise ValueError(
                f"resume_from_checkpoint must hold the optimizer's state as this run keeps it, {wanted}; got "
                f"{', '.join(found)} in {folder}. Set deepspeed, fsdp_config and its state_dict_type as they were, or "
                "start from the weights alone with lora_model_dir."
            )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model.

    Works around: a compiled model hides what it wraps.
    Upstream: torch/_dynamo/eval_frame.py, ``OptimizedModule``.
    """
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Put every parameter back that FSDP2 holds whole, and in the type of the computation, after a forward.

    Works around: with ``reshard_after_forward: false`` it does so before a state dict is made, and otherwise never.
    Upstream: torch/distributed/fsdp/_fully_shard/_fsdp_state.py.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters of a model that FSDP2 has sharded, gathered; every process must call it.

    Works around: the wrappers of FSDP's own activation checkpointing stand in the names of parameters.
    Upstream: torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py.
    """
    from torch.distributed.tensor import DTensor

    reshard(model)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            found[name.replace(_CHECKPOINTED, "")] = value.cpu()
    return found


_CHECKPOINTED = "_checkpoint_wrapped_module."


def load_whole_adapter(model: nn.Module, folder: str) -> None:
    """Load what ``whole_adapter`` gave from a checkpoint; every process must call it, the first one reads the file.

    Raises:
        ValueError: On every process, if the file does not hold exactly the tensors of the adapter.
    """
    import torch
    import torch.distributed as dist
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import load_file
    from torch.distributed.tensor import DTensor, distribute_tensor

    reshard(model)
    trained = {name.replace(_CHECKPOINTED, ""): one for name, one in model.named_parameters() if one.requires_grad}
    expected = cast(dict[str, DTensor], get_peft_model_state_dict(model, state_dict=trained))
    path, first = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), dist.get_rank() == 0
    saved = load_file(path) if first else {}
    shapes = {name: tuple(parameter.shape) for name, parameter in expected.items()}
    differing = [
        name for name in shapes.keys() | saved.keys() if name not in saved or saved[name].shape != shapes.get(name)
    ]
    said = [sorted(differing) if first else []]
    dist.broadcast_object_list(said, src=0)
    if said[0]:
        raise ValueError(
            f"a checkpoint must hold exactly the tensors of the adapter; got {len(said[0])} missing, unknown or of "
            f"another shape in {path} ({said[0][0]}). Use the steps, ranks and layers that it was trained with."
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            if first:
                whole.copy_(saved[name])
            parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))


def save_whole_adapters() -> None:
    """Have axolotl save the adapter of a run under FSDP2 as checkpoints hold it; ``undo_patches`` reverts it.

    Works around: axolotl gathers it itself at the end, under the names that ``whole_adapter`` corrects.
    Upstream: axolotl/integrations/expert_parallel/shard.py, ``save_fsdp2_lora_adapter``, as axolotl/train.py calls it.
    """
    with private_names():
        from axolotl.integrations.expert_parallel import shard

    def save_adapter(model: Any, output_dir: str) -> bool:
        import torch.distributed as dist

        state = whole_adapter(model)
        if not dist.is_initialized() or dist.get_rank() == 0:
            model.save_pretrained(output_dir, state_dict=state)
        if dist.is_initialized():
            dist.barrier()
        return True

    _patch(shard, "save_fsdp2_lora_adapter", save_adapter)


# --- processes without an accelerator -------------------------------------------------------------------------------


def trains_alone_on_cpu(cfg: Any) -> bool:
    """Whether one process trains without an accelerator and without DeepSpeed: the only run that may have `use_cpu`.

    Works around: transformers refuses bf16 on the CPU unless `use_cpu` is set, which axolotl has no key for. With
    several processes or DeepSpeed the argument would make accelerate ignore them.
    Upstream: transformers/training_args.py, ``__post_init__`` and ``_setup_devices``.
    """
    import torch

    alone = int(os.environ.get("WORLD_SIZE", "1")) < 2 and not cfg.deepspeed
    return alone and not torch.accelerator.is_available()


_patched: dict[tuple[Any, str], Any] = {}


def _patch(owner: Any, name: str, replacement: Any) -> None:
    """Replace an attribute of a class or module, once."""
    if (owner, name) not in _patched:
        _patched[owner, name] = getattr(owner, name)
        setattr(owner, name, replacement)


def enable_gloo_for_cpu_processes(deepspeed: bool) -> None:
    """Let several processes on a machine without an accelerator train together, over gloo.

    Only such runs are patched; ``undo_patches`` reverts it. Works around, in turn:

    * accelerate leaves the back end empty there and then assumes a single process.
      Upstream: accelerate/state.py, ``PartialState._prepare_backend``.
    * axolotl places the model of every process on the accelerator of its local rank.
      Upstream: axolotl/loaders/model.py, ``ModelLoader._set_device_map_config``.
    * axolotl shards over accelerators, whatever the machine has, and accelerate does not shard without them.
      Upstream: axolotl/utils/distributed.py, ``build_parallelism_config``; accelerate/state.py, ``AcceleratorState``.
    * axolotl asks a CUDA build of torch whether GPUs reach each other, where there is no driver.
      Upstream: axolotl/utils/trainer.py, ``prepare_optim_env``.
    * gloo copies through views of the output, which autograd forbids while ZeRO-1 and 2 gather parameters.
      Upstream: deepspeed/comm/torch.py, ``TorchBackend.all_gather_into_tensor``.
    """
    import torch
    from accelerate import ParallelismConfig
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    if torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    with private_names():
        from axolotl.loaders.model import ModelLoader
        from axolotl.utils import trainer

        _ = trainer.check_cuda_p2p_ib_support
        prepare, place = PartialState._prepare_backend, ModelLoader._set_device_map_config

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, distributed_type = prepare(self, *args, **kwargs)
        # Without the type the processes would connect but no gradient be averaged.
        return (backend, distributed_type) if backend else ("gloo", DistributedType.MULTI_CPU)

    def set_device_map_config(self: Any) -> None:
        place(self)
        if "device_map" in self.model_kwargs:
            self.model_kwargs["device_map"] = {"": "cpu"}

    _patch(PartialState, "_prepare_backend", prepare_backend)
    _patch(trainer, "check_cuda_p2p_ib_support", lambda: True)
    build, start = ParallelismConfig.build_device_mesh, AcceleratorState.__init__

    def build_device_mesh(self: Any, device_type: str) -> Any:
        return build(self, "cpu")

    def init_state(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        known = self.initialized
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and not known and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    _patch(ModelLoader, "_set_device_map_config", set_device_map_config)
    _patch(ParallelismConfig, "build_device_mesh", build_device_mesh)
    _patch(AcceleratorState, "__init__", init_state)
    if deepspeed:
        from deepspeed.comm.torch import TorchBackend

        gather = TorchBackend.all_gather_into_tensor

        def all_gather_into_tensor(self: Any, output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
            return gather(self, output_tensor.detach(), input_tensor.detach(), *args, **kwargs)

        _patch(TorchBackend, "all_gather_into_tensor", all_gather_into_tensor)


def undo_patches() -> None:
    """Put everything back that this module has replaced."""
    for (owner, name), original in _patched.items():
        setattr(owner, name, original)
    _patched.clear()
