"""What training needs from axolotl, accelerate and DeepSpeed beyond their hooks."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from axolotl.loaders.model import ModelLoader
from axolotl.utils.dict import DictDefault
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


def test_axolotl_announces_zero3_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.utils.trainer import setup_deepspeed_env

    assert 'os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)' in inspect.getsource(setup_deepspeed_env)
    for value, expected in (("3", True), ("2", False), (None, False)):
        monkeypatch.delenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", raising=False)
        if value is not None:
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", value)
        assert compat.uses_zero3() is expected


# --- the trainer ----------------------------------------------------------------------------------------------------


def test_the_trainer_has_the_methods_that_are_replaced() -> None:
    assert parameters(Trainer._get_num_items_in_batch) == ["self", "batch_samples", "device"]
    assert parameters(Trainer.get_batch_samples) == ["self", "epoch_iterator", "num_batches", "device"]
    expected = ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert parameters(AxolotlTrainer.compute_loss) == parameters(Trainer.compute_loss) == expected
    assert "compute_loss_func" in inspect.getsource(Trainer.training_step)
    assert "self._get_num_items_in_batch(" in inspect.getsource(Trainer.prediction_step)
    assert "self.get_batch_samples(" in inspect.getsource(Trainer)
    assert "metric_key_prefix" in parameters(Trainer.evaluation_loop)


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
def test_every_process_keeps_its_model_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(self: Any) -> None:
        self.model_kwargs["device_map"] = {"": 1}

    assert parameters(ModelLoader._set_device_map_config) == ["self"]
    assert '"device_map"' in inspect.getsource(ModelLoader._set_device_map_config)
    monkeypatch.setattr(ModelLoader, "_set_device_map_config", place)
    compat.enable_gloo_for_cpu_processes(deepspeed=False)
    loader = SimpleNamespace(model_kwargs={})
    ModelLoader._set_device_map_config(loader)
    assert loader.model_kwargs == {"device_map": {"": "cpu"}}


@pytest.mark.usefixtures("two_cpu_processes")
def test_deepspeed_gathers_without_autograd_and_a_rejected_configuration_leaves_nothing_behind() -> None:
    from deepspeed.comm.torch import TorchBackend

    owners = {PartialState: "_prepare_backend", ModelLoader: "_set_device_map_config"}
    owners[TorchBackend] = "all_gather_into_tensor"
    before = {owner: getattr(owner, name) for owner, name in owners.items()}
    assert parameters(TorchBackend.all_gather_into_tensor)[:3] == ["self", "output_tensor", "input_tensor"]
    for _ in range(2):  # a second call patches nothing again
        compat.enable_gloo_for_cpu_processes(deepspeed=True)
    assert all(getattr(owner, name) is not before[owner] for owner, name in owners.items())
    MotePlugin().on_config_validation_error({})
    assert {owner: getattr(owner, name) for owner, name in owners.items()} == before


@pytest.mark.parametrize(("cuda", "world"), [(True, "2"), (False, "1")])
def test_other_runs_are_not_patched(cuda: bool, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("WORLD_SIZE", world)
    before = PartialState._prepare_backend
    compat.enable_gloo_for_cpu_processes(deepspeed=True)
    assert PartialState._prepare_backend is before
