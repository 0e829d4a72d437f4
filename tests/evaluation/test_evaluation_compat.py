"""Private names of inspect_ai: a release that changes them is told by name."""

from __future__ import annotations

import importlib
import sys
from dataclasses import fields
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

from inspect_ai._eval.task import task as task_module
from inspect_ai.solver import _task_state

from axolotl_mote.evaluation import compat
from axolotl_mote.versions import TESTED


@pytest.mark.parametrize(("module", "name"), [(task_module, "PreviousTask"), (_task_state, "sample_state")])
def test_a_name_that_is_gone_is_said_at_import(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    monkeypatch.delattr(module, name)
    monkeypatch.delitem(sys.modules, compat.__name__)
    with pytest.raises(ImportError, match=name) as refused:
        importlib.import_module(compat.__name__)
    assert str(refused.value).startswith(f"inspect_ai must be {TESTED['inspect_ai']}, the versions that")


def test_a_resumed_task_has_the_fields_of_this_release() -> None:
    names = ["id", "task", "task_args", "model", "model_roles", "sandbox", "log", "log_info"]
    assert [field.name for field in fields(task_module.PreviousTask)] == names
