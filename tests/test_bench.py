"""The training-step benchmark starts, at a size where its numbers mean nothing but its code is the GPU's."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def run(repo: Path, *arguments: str) -> dict[str, Any]:
    """Its JSON; the table goes to standard error."""
    done = subprocess.run(
        [sys.executable, str(repo / "tests/bench/train_step.py"), "--size", "tiny", "--json", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture
def train_step(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(repo / "tests/bench"))
    return importlib.import_module("train_step")


def test_every_variant_runs_packed_and_checkpointed(repo: Path, train_step: ModuleType) -> None:
    fast = ("--rounds", "2", "--warmup", "1", "--compile-backend", "aot_eager")
    result = run(repo, "--layout", "packed", "--checkpointing", *fast)
    measured = {row["variant"] for row in result["rows"]}
    assert measured | set(result["skipped"]) == set(train_step.SPECS)
    assert {"mote", "mote_dropout_dense", "peft_lora_r64", "expanded"} <= measured
    assert not [reason for reason in result["skipped"].values() if reason.startswith("failed")]
    assert result["device"] == "cpu"
    for row in result["rows"]:
        assert set(row) == {"variant", "median_ms", "min_ms", "max_ms", "memory_gib"}
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    assert "backward" in result["skipped"]["mote_dropout_flex"]
    assert result["masked_loras_largest_difference"] < 1e-4
    assert 4 < result["expanded_token_ratio"] < 5
    assert result["graphs_compiled_while_timing"] == 0
    assert result["ratios"]["peft_lora_r64"]["peft_lora_r64"] == 1
    assert result["matmul_floor_ms"] > 0


def test_rows_layout_and_a_choice_of_variants(train_step: ModuleType) -> None:
    arguments = ["--size", "tiny", "--variants", "mote,expanded", "--rounds", "1", "--warmup", "0"]
    result = train_step.run(train_step.parse(arguments), print)
    assert [variant.name for variant in result.variants] == ["mote", "expanded"]
    assert [len(variant.batches) for variant in result.variants] == [1, 7]
    assert result.variants[0].batches[0].input_ids.shape == (2, 96)


def test_a_failing_variant_is_reported_and_costs_no_other(
    train_step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bench: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(train_step.SPECS, "masked_loras", train_step.Spec(fail))
    arguments = ["--size", "tiny", "--variants", "masked_loras,mote", "--rounds", "1", "--warmup", "0"]
    result = train_step.run(train_step.parse(arguments), print)
    assert [variant.name for variant in result.variants] == ["mote"]
    assert result.skipped == {"masked_loras": "failed: RuntimeError: no such kernel"}


def test_an_unknown_variant_is_named(train_step: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.parse(["--variants", "mots"])
    assert "got mots" in capsys.readouterr().err
