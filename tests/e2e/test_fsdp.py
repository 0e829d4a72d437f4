"""FSDP2 on two processes over gloo: it trains what one process trains, and every checkpoint holds the whole adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from .compare import largest_difference
from .conftest import BEST

TOLERANCE = 1e-4

LAYERS = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "reshard_after_forward": True,
}
WITNESS = """\
from axolotl.integrations.base import BasePlugin
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


class Look(TrainerCallback):
    def on_step_end(self, *_, model=None, **__):
        whole = [name for name, one in model.named_parameters() if not isinstance(one, DTensor)]
        parts = sum(one.to_local().numel() for one in model.parameters())
        print(f"WITNESS: {len(whole)} unsharded, {parts / sum(one.numel() for one in model.parameters()):.2f} here")


class Witness(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        return [Look()]
"""


def fsdp(state: str, **options: Any) -> dict[str, Any]:
    return {"fsdp_version": 2, "fsdp_config": {**LAYERS, "state_dict_type": f"{state}_STATE_DICT", **options}}


@pytest.mark.needs("reference")
def test_two_processes_equal_one(runs: Any, workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user starts it, with FSDP's own checkpointing, and only the first process reading the base model."""
    (workshop.folder / "witness.py").write_text(WITNESS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(workshop.folder))
    options = fsdp("FULL", cpu_ram_efficient_loading=True, activation_checkpointing=True)
    found = workshop.train_as_a_user(
        "two", processes=2, plugins=["axolotl_mote.MotePlugin", "witness.Witness"], **options
    )
    log = (workshop.folder / "two" / "train.log").read_text(encoding="utf-8")
    assert log.count("WITNESS: 0 unsharded, 0.50 here") == 12, "all parameters of both processes, after each step"
    assert largest_difference(runs.get("reference"), found) < TOLERANCE


@pytest.mark.needs("tied")
def test_tied_tables_stay_tied(runs: Any, workshop: Any, tied_model: Path) -> None:
    options = fsdp("FULL", cpu_ram_efficient_loading=True)
    found = workshop.train("tied_sharded", processes=2, base_model=str(tied_model), **options)
    assert largest_difference(runs.get("tied"), found) < TOLERANCE


FOUR_THEN_TWO = {"processes": 4, "then": {"processes": 2, "gradient_accumulation_steps": 2}}


@pytest.mark.needs("reference", "accumulated")
@pytest.mark.parametrize(
    ("state", "like", "how"),
    [("FULL", "reference", {"auto": True, "processes": 2}), ("SHARDED", "accumulated", FOUR_THEN_TWO)],
)
def test_killed_processes_resume(runs: Any, workshop: Any, state: str, like: str, how: dict[str, Any]) -> None:
    """On as many processes, or on half of them with twice the micro-batches."""
    found = workshop.train_killed_and_resumed(f"resumed_{state}", **how, **fsdp(state))
    assert largest_difference(runs.get(like), found) < TOLERANCE
    whole = {name: tensor.shape for name, tensor in load_file(found / "adapter_model.safetensors").items()}
    saved = load_file(found / "checkpoint-3" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == whole


@pytest.mark.needs("reference", "best")
def test_the_best_checkpoint_is_loaded(runs: Any, workshop: Any) -> None:
    found = workshop.train("best_sharded", processes=2, **BEST, **fsdp("FULL"))
    assert largest_difference(runs.get("best"), found) < TOLERANCE
    last = found / "checkpoint-6"
    assert largest_difference(last, found) > 100 * TOLERANCE, "the last checkpoint is not the best"


@pytest.mark.needs("accumulated")
def test_two_processes_equal_one_with_accumulation(runs: Any, workshop: Any) -> None:
    found = workshop.train("accumulated_sharded", processes=2, gradient_accumulation_steps=2, **fsdp("FULL"))
    assert largest_difference(runs.get("accumulated"), found) < TOLERANCE


def test_weights_that_are_no_numbers_end_training_on_every_process(workshop: Any) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    result = workshop.run(
        "train",
        "diverged",
        processes=2,
        learning_rate=1e30,
        max_grad_norm=0.0,
        micro_batch_size=1,
        **saves,
        **fsdp("FULL"),
    )
    assert result.returncode != 0
    assert "learning_rate must keep the weights finite" in result.log
    saved = workshop.output("diverged").rglob("adapter_model.safetensors")
    assert all(tensor.isfinite().all() for path in saved for tensor in load_file(path).values())
