"""What training needs from axolotl, accelerate and DeepSpeed beyond their hooks."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, DistributedType, PartialState
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from axolotl.loaders.model import ModelLoader
from axolotl.utils import distributed
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from kit import base_model
from transformers import Trainer

from axolotl_mote.training import compat
from axolotl_mote.training.plugin import MotePlugin

pytestmark = pytest.mark.smoke  # against every version that is supported


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_every_hook_of_the_plugin_is_one_of_axolotls() -> None:
    for name, hook in vars(MotePlugin).items():
        if not name.startswith("_"):
            assert parameters(hook) == parameters(getattr(BasePlugin, name)), name


# --- loading --------------------------------------------------------------------------------------------------------


def test_axolotl_leaves_embeddings_alone_whose_resizing_is_blocked() -> None:
    model = base_model("llama")
    rows = model.get_input_embeddings().weight.shape[0]
    loader = SimpleNamespace(model=model, tokenizer=[None] * (rows + 6), cfg=DictDefault({}), model_config=model.config)
    compat.block_embedding_resize(model)
    ModelLoader._resize_token_embeddings(loader)
    assert model.get_input_embeddings().weight.shape[0] == rows
    compat.allow_embedding_resize(model)
    assert model.get_input_embeddings().num_embeddings == rows
    ModelLoader._resize_token_embeddings(loader)
    assert model.get_input_embeddings().num_embeddings == rows + 6


def test_the_size_of_a_partitioned_table_is_restored() -> None:
    model = base_model("llama")
    weight = model.get_input_embeddings().weight
    rows = weight.shape[0]
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    compat.block_embedding_resize(model)
    compat.allow_embedding_resize(model)
    assert model.get_input_embeddings().num_embeddings == rows


def test_linear_layers_are_those_of_the_decoder() -> None:
    names = compat.find_linear_layers(base_model("llama"))
    assert sorted(names) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", ["embed_tokens", "lm_head"]), ("llama_tied", ["embed_tokens"])]
)
def test_embedding_layers_are_named(family: str, expected: list[str], tmp_path: Path) -> None:
    base_model(family).config.save_pretrained(tmp_path)
    assert compat.find_embedding_layers(DictDefault({"base_model": str(tmp_path)})) == expected


@pytest.mark.parametrize(("stage", "expected"), [(3, True), (2, False), (None, False)])
def test_axolotl_announces_zero3_in_the_environment(
    stage: int | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    from axolotl.utils import trainer

    monkeypatch.setattr(os, "environ", {**os.environ, "WORLD_SIZE": "2"})  # more than one: no process group is started
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", raising=False)
    monkeypatch.setattr(trainer, "init_distributed_state", lambda: None)
    config = tmp_path / "deepspeed.json"
    config.write_text("{}")
    trainer.setup_deepspeed_env(DictDefault({"deepspeed": str(config), "gradient_accumulation_steps": 1}), stage=stage)
    assert compat.uses_zero3() is expected


def test_a_partitioned_parameter_is_gathered_and_any_other_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = pytest.importorskip("deepspeed")
    source = inspect.getsource(deepspeed.runtime.zero.partition_parameters)
    assert "param.ds_id = " in source
    assert "param.ds_shape = " in source
    told = []

    @contextmanager
    def gather(parameter: torch.Tensor) -> Iterator[None]:
        told.append(parameter)
        yield

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", gather)
    whole, partitioned = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.empty(0))
    partitioned.ds_id = 0
    for parameter in (whole, partitioned):
        with compat.gathered(parameter):
            pass
    assert len(told) == 1
    assert told[0] is partitioned


# --- the trainer ----------------------------------------------------------------------------------------------------


def test_the_trainer_has_the_methods_that_are_replaced() -> None:
    assert parameters(Trainer._get_num_items_in_batch) == ["self", "batch_samples", "device"]
    assert parameters(Trainer.get_batch_samples) == ["self", "epoch_iterator", "num_batches", "device"]
    expected = ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert parameters(AxolotlTrainer.compute_loss) == parameters(Trainer.compute_loss) == expected
    assert "metric_key_prefix" in parameters(Trainer.evaluation_loop)
    assert parameters(Trainer.save_model) == ["self", "output_dir", "_internal_call"]
    assert parameters(AxolotlTrainer._save_checkpoint)[:3] == parameters(Trainer._save_checkpoint)
    assert "self.save_model(output_dir, _internal_call=True)" in inspect.getsource(Trainer._save_checkpoint)
    assert parameters(AxolotlTrainer._save) == ["self", "output_dir", "state_dict"]
    assert parameters(Trainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
    assert parameters(Trainer._load_best_model) == ["self"]


def test_axolotl_saves_the_adapter_through_a_function_that_is_replaced() -> None:
    from axolotl import train

    assert parameters(train.save_trained_model) == ["cfg", "trainer", "model"]
    assert "    save_trained_model(cfg, trainer, model)" in inspect.getsource(train.train)


def test_axolotl_saves_the_adapter_of_sharded_runs_through_a_function_that_is_replaced() -> None:
    from axolotl import train
    from axolotl.integrations.expert_parallel import shard

    assert parameters(shard.save_fsdp2_lora_adapter) == ["model", "output_dir"]
    assert "if save_fsdp2_lora_adapter(model, cfg.output_dir):" in inspect.getsource(train.save_trained_model)
    original = shard.save_fsdp2_lora_adapter
    compat.save_whole_adapters()
    assert shard.save_fsdp2_lora_adapter is not original
    compat.undo_patches()
    assert shard.save_fsdp2_lora_adapter is original


def test_wrappers_of_checkpointing_are_not_in_the_names_of_a_saved_adapter() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    model = torch.nn.Sequential(checkpoint_wrapper(torch.nn.Sequential(torch.nn.Linear(2, 2), frozen)))
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    assert compat.whole_adapter(model).keys() == {"0.0.weight", "0.0.bias"}


class OwnTotal(compat.OwnLoss, AxolotlTrainer):
    """Every micro-batch has loss 8; every window has total 7."""

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], torch.Tensor]:
        batches, total = super().get_batch_samples(*args)
        assert total is None
        self.windows = [*getattr(self, "windows", []), len(batches)]
        return batches, torch.tensor(7.0)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        self.totals = [*getattr(self, "totals", []), num_items_in_batch]
        outputs = self.run_model(model, inputs)
        loss = outputs.logits.mean() * 0 + 8.0
        return (loss, outputs) if return_outputs else loss


def test_the_trainer_takes_our_loss_as_it_is_and_counts_nothing_in_evaluation(tmp_path: Path) -> None:
    from axolotl.core.training_args import AxolotlTrainingArguments

    arguments = AxolotlTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        include_tkps=False,
        max_steps=1,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        save_strategy="no",
    )
    ids = list(range(3, 9))
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 2).with_format("torch")
    made = OwnTotal(model=base_model("llama"), args=arguments, train_dataset=rows, eval_dataset=rows)
    assert made.train().training_loss == 16.0  # the sum of the window; divided by the accumulation steps it would be 8
    assert made.windows == [2]
    assert made.totals == [7.0, 7.0]
    assert made.evaluate()["eval_loss"] == 8.0
    assert made.totals[2:] == [None, None]


# --- processes without an accelerator -------------------------------------------------------------------------------


@pytest.fixture
def two_cpu_processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    yield
    compat.undo_patches()


@pytest.mark.usefixtures("two_cpu_processes")
def test_gloo_is_chosen_where_accelerate_finds_no_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parameters(PartialState._prepare_backend) == ["self", "cpu", "sagemaker_dp", "backend"]
    monkeypatch.setattr(PartialState, "_prepare_backend", lambda self, *args, **kwargs: (None, None))
    compat.enable_gloo_for_cpu_processes(deepspeed=False)
    state = PartialState.__new__(PartialState)
    assert state._prepare_backend() == ("gloo", DistributedType.MULTI_CPU)


@pytest.mark.usefixtures("two_cpu_processes")
def test_no_driver_is_asked_whether_gpus_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build of torch raises an error where there is none."""
    from axolotl.utils import trainer

    def ask() -> bool:
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(trainer, "check_cuda_p2p_ib_support", ask)
    with pytest.raises(RuntimeError, match="no NVIDIA driver"):
        trainer.prepare_optim_env(DictDefault({}))
    compat.enable_gloo_for_cpu_processes(deepspeed=False)
    trainer.prepare_optim_env(DictDefault({}))


@pytest.mark.usefixtures("two_cpu_processes")
def test_every_process_keeps_its_model_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(self: Any) -> None:
        self.model_kwargs["device_map"] = {"": 1}

    assert parameters(ModelLoader._set_device_map_config) == ["self"]
    told = SimpleNamespace(cfg=DictDefault({"device_map": {"": 1}}), model_kwargs={}, is_fsdp_enabled=False)
    ModelLoader._set_device_map_config(told)
    assert told.model_kwargs["device_map"] == {"": 1}
    monkeypatch.setattr(ModelLoader, "_set_device_map_config", place)
    compat.enable_gloo_for_cpu_processes(deepspeed=False)
    loader = SimpleNamespace(model_kwargs={})
    ModelLoader._set_device_map_config(loader)
    assert loader.model_kwargs == {"device_map": {"": "cpu"}}


@pytest.mark.usefixtures("two_cpu_processes")
def test_deepspeed_gathers_without_autograd_and_a_rejected_configuration_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepspeed.comm.torch import TorchBackend

    assert callable(TorchBackend.all_gather_into_tensor)
    seen: list[bool] = []
    monkeypatch.setattr(
        TorchBackend,
        "all_gather_into_tensor",
        lambda self, out, given, **_: seen.extend(t.requires_grad for t in (out, given)),
    )
    owners = {PartialState: "_prepare_backend", ModelLoader: "_set_device_map_config"}
    owners[TorchBackend] = "all_gather_into_tensor"
    before = {owner: getattr(owner, name) for owner, name in owners.items()}
    for _ in range(2):  # a second call patches nothing again
        compat.enable_gloo_for_cpu_processes(deepspeed=True)
    assert all(getattr(owner, name) is not before[owner] for owner, name in owners.items())
    tensors = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    TorchBackend.all_gather_into_tensor(None, *tensors, group=None)
    assert seen == [False, False]
    MotePlugin().on_config_validation_error({})
    assert {owner: getattr(owner, name) for owner, name in owners.items()} == before


@pytest.mark.usefixtures("two_cpu_processes")
def test_processes_on_cpus_shard_over_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 'build_device_mesh("cuda")' in inspect.getsource(distributed.build_parallelism_config)
    assert parameters(ParallelismConfig.build_device_mesh) == ["self", "device_type"]
    started = inspect.getsource(AcceleratorState.__init__)
    assert "self.distributed_type = DistributedType.FSDP" in started
    assert "fsdp_plugin.set_mixed_precision(self._mixed_precision)" in started
    monkeypatch.setattr(ParallelismConfig, "build_device_mesh", lambda self, device_type: device_type)
    compat.enable_gloo_for_cpu_processes(deepspeed=False)
    assert ParallelismConfig.build_device_mesh(None, "cuda") == "cpu"


@pytest.mark.parametrize(("cuda", "world"), [(True, "2"), (False, "1")])
def test_other_runs_are_not_patched(cuda: bool, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("WORLD_SIZE", world)
    before = PartialState._prepare_backend
    compat.enable_gloo_for_cpu_processes(deepspeed=True)
    assert PartialState._prepare_backend is before
