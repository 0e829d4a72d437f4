"""What FSDP2 has sharded, in a process group of one: what is saved of it, and what is loaded into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit import chain, mote
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from axolotl_mote.training import compat

FILE = "adapter_model.safetensors"


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(params=[True, False], ids=["resharded", "kept whole"])
def sharded(request: pytest.FixtureRequest, group: None) -> PeftModel:
    """A model as axolotl shards it for bf16: float32 experts, computed in bf16."""
    model = mote("llama_tied")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    mesh = dist.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": request.param}
    for module in list(model.modules()):
        if isinstance(module, LoraLayer) and module.lora_A:
            fully_shard(module.lora_A["default"], **options)
            fully_shard(module.lora_B["default"], **options)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def run(model: PeftModel) -> None:
    with torch.no_grad():
        model(input_ids=torch.tensor([chain()]))


def test_what_is_saved_after_an_evaluation_is_what_is_trained(sharded: PeftModel) -> None:
    before = {name: tensor.clone() for name, tensor in compat.whole_adapter(sharded).items()}
    assert before
    run(sharded)
    after = compat.whole_adapter(sharded)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    run(sharded)
    compat.reshard(sharded)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())


def test_a_saved_adapter_is_loaded_after_an_evaluation(sharded: PeftModel, tmp_path: Path) -> None:
    saved = {name: tensor + 1 for name, tensor in compat.whole_adapter(sharded).items()}
    save_file(get_peft_model_state_dict(sharded, state_dict=saved), tmp_path / FILE)
    run(sharded)
    compat.load_whole_adapter(sharded, str(tmp_path))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in compat.whole_adapter(sharded).items())


@pytest.mark.parametrize("sharded", [True], indirect=True)
def test_tensors_of_another_adapter_are_refused_and_none_is_loaded(sharded: PeftModel, tmp_path: Path) -> None:
    whole = {name: tensor.clone() for name, tensor in compat.whole_adapter(sharded).items()}
    save_file(get_peft_model_state_dict(sharded, state_dict=whole), tmp_path / FILE)
    good = load_file(tmp_path / FILE)
    name, tensor = next(iter(good.items()))
    for change in ({name: None}, {name: tensor[:1].clone()}, {f"{name}.more": tensor.clone()}):
        spoilt = {key: value for key, value in {**good, **change}.items() if value is not None}
        save_file({key: value + 1 for key, value in spoilt.items()}, tmp_path / FILE)
        with pytest.raises(
            ValueError, match=r"must hold exactly the tensors of the adapter; got 1 missing, unknown or"
        ):
            compat.load_whole_adapter(sharded, str(tmp_path))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in compat.whole_adapter(sharded).items())


# --- the trainer ----------------------------------------------------------------------------------------------------


def trainer(**plugin: Any) -> Any:
    found = compat.WholeAdapters()
    found.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin)))
    found.is_fsdp_enabled, found.model = True, torch.nn.Linear(2, 2)
    return found


def test_fsdp1_of_a_launcher_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^fsdp_version must be 2 with chain data; got 1 from the launcher\."):
        trainer(fsdp_version=1).check_fsdp()


def test_gradients_are_summed_in_float32() -> None:
    low = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    found = trainer(fsdp_version=2, mixed_precision_policy=low)
    found.check_fsdp()
    expected = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None)
    assert found.accelerator.state.fsdp_plugin.mixed_precision_policy == expected
    trainer(fsdp_version=2, mixed_precision_policy=None).check_fsdp()


def test_evaluation_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^fsdp_config must not be set to evaluate alone; .* `axolotl evaluate`\.$"):
        trainer().evaluation_loop()


@pytest.mark.parametrize(
    ("kind", "there", "wanted"),
    [("FULL", "optimizer.pt", "optimizer.bin"), ("SHARDED", "optimizer.bin", "optimizer_0")],
)
def test_the_optimizer_of_another_sharding_is_refused(kind: str, there: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / there).touch()
    found = trainer(state_dict_type=f"StateDictType.{kind}_STATE_DICT")
    with pytest.raises(ValueError, match=rf"as this run keeps it, {wanted}; got {there} in "):
        found._load_from_checkpoint(str(tmp_path))
