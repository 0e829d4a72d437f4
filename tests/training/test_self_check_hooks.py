"""When training runs the self-check: at load, or under ZeRO-3 and FSDP2 when it begins; never if it is switched off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from axolotl.utils.dict import DictDefault
from kit import mote

from axolotl_mote.training import selfcheck


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Kind and precision of every check."""
    found: list[tuple[str, Any]] = []
    for kind in ("check_training", "check_generation"):

        def check(model: Any, forward: Any = None, *, kind: str = kind) -> None:
            assert forward is (model if selfcheck.uses_fsdp() and kind == "check_training" else None)
            found.append((kind, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None))

        monkeypatch.setattr(selfcheck, kind, check)
    return found


def config(**options: Any) -> DictDefault:
    return DictDefault(adapter="mote", **options)


def test_it_runs_at_load_in_the_precision_of_training(checked: list[Any]) -> None:
    for cfg in (config(), config(bf16="full"), config(fp16=True)):
        selfcheck.self_check(cfg, mote(), inference=False)
        assert selfcheck.callbacks(cfg) == []
    selfcheck.self_check(config(), mote(), inference=True)
    training = "check_training"
    assert checked == [
        (training, None),
        (training, torch.bfloat16),
        (training, torch.float16),
        ("check_generation", None),
    ]


def test_under_zero3_it_waits_for_training_to_begin(checked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    cfg = config(bf16=True)
    selfcheck.self_check(cfg, mote(), inference=False)
    assert checked == []
    (callback,) = selfcheck.callbacks(cfg)
    callback.on_train_begin(None, None, None, model=mote())
    assert checked == [("check_training", torch.bfloat16)]


def test_under_fsdp_it_runs_the_model_that_is_sharded(checked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    selfcheck.self_check(config(), mote(), inference=False)
    assert checked == []
    (callback,) = selfcheck.callbacks(config())
    callback.on_train_begin(None, None, None, model=mote())
    selfcheck.self_check(config(), mote(), inference=True)  # nothing is sharded there
    assert checked == [("check_training", None), ("check_generation", None)]


def test_it_can_be_switched_off(checked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    off = config(mote={"self_check": False})
    selfcheck.self_check(off, mote(), inference=False)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert selfcheck.callbacks(off) == []
    assert checked == []
