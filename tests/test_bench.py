"""The benchmark and the GPU session start, at a size where their numbers mean nothing but their code is the GPU's."""

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
import torch
from kit import STEPS, with_markers
from transformers import AutoTokenizer


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
    assert {"mote", "mote_dropout_dense", "peft_lora_r64", "peft_lora_r64_scored", "expanded"} <= measured
    assert not [reason for reason in result["skipped"].values() if reason.startswith("failed")]
    assert result["device"] == "cpu"
    for row in result["rows"]:
        assert set(row) == {"variant", "median_ms", "min_ms", "max_ms", "memory_gib"}
        assert 0 < row["memory_gib"] < 1
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    assert "backward" in result["skipped"]["mote_dropout_flex"]
    assert result["masked_loras_relative_difference"] < 1e-5
    assert 4 < result["expanded_token_ratio"] < 5
    assert result["graphs_compiled_while_timing"] == 0
    assert result["ratios"]["peft_lora_r64"]["peft_lora_r64"] == 1
    low, high = result["quartiles"]["peft_lora_r64"]["mote"]
    assert low <= result["ratios"]["peft_lora_r64"]["mote"] <= high
    assert result["matmul_floor_ms"] > 0


def test_rows_layout_and_a_choice_of_variants(train_step: ModuleType) -> None:
    arguments = ["--size", "tiny", "--variants", "mote,expanded", "--rounds", "1", "--warmup", "0"]
    result = train_step.run(train_step.parse(arguments), print)
    assert [variant.name for variant in result.variants] == ["mote", "expanded"]
    assert [len(variant.steps[0]) for variant in result.variants] == [1, 7]
    assert result.variants[0].batches[0].input_ids.shape == (2, 128)


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


def test_real_chains_are_trained_on_as_training_encodes_them(
    repo: Path, smollm2_dir: Path, seed_chains: Path, train_step: ModuleType
) -> None:
    from axolotl_mote.chain.codec import ChainCodec

    batches = importlib.import_module("batches")
    documents, marker_ids = batches.real_documents(smollm2_dir, seed_chains)
    codec = ChainCodec(with_markers(AutoTokenizer.from_pretrained(smollm2_dir)), STEPS)
    assert marker_ids == list(codec.vocabulary.marker_ids)
    encoded = [codec.encode_chain(json.loads(line)) for line in seed_chains.read_text("utf-8").splitlines()]
    rows = batches.full_rows(documents)
    expected = sorted((one["input_ids"], one["labels"]) for one in encoded)
    assert sorted((ids.tolist(), labels.tolist()) for ids, labels in rows) == expected
    batch = batches.padded(rows[:2])
    assert batch.input_ids.shape[1] % 64 == 0
    assert batch.attention_mask.sum() == sum(len(ids) for ids, _ in rows[:2])
    scored = torch.zeros_like(batch.targets).flatten().scatter(0, batch.scored, 1).bool().view_as(batch.targets)
    assert not (batch.targets != -100)[~scored].any()
    assert 0 < len(batch.scored) <= batch.input_ids.numel() + 63
    assert int(batch.below(49152).input_ids.max()) == 49151
    patterns = len(batches.expanded_rows(documents))
    assert len(documents) < patterns < 7 * len(documents)  # not every chain holds every step


# --- the session on a GPU, whose program must have run before a GPU is at hand ---------------------------------------


@pytest.fixture
def gpu_session(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The session as a module."""
    monkeypatch.syspath_prepend(str(repo / "tests/bench"))
    return importlib.import_module("gpu_session")


def test_the_whole_session_runs_on_the_cpu_without_axolotl(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['axolotl'] = None\n")
    output = tmp_path / "results.json"
    program = [sys.executable, repo / "tests/bench/gpu_session.py", "--device", "cpu", "--rounds", "1"]
    done = subprocess.run(
        [*program, "--output", output],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = json.loads(output.read_text())
    parts = {part["name"]: part for part in results["parts"]}
    assert {name: part["status"] for name, part in parts.items()} == {
        "attention": "ok",
        "compiled": "ok",
        "flash attention": parts["flash attention"]["status"],
        "step": "ok",
        "fused kernels": "not run: axolotl",
        "other ways": "ok",
    }
    assert parts["flash attention"]["status"].startswith("not run: ")
    assert "mote_compiled" in parts["step"]["bench"]["ratios"]["peft_lora_r64"]
    assert {"torch", "transformers", "peft", "pytest"} <= results["versions"].keys()
    assert "not run: axolotl" in done.stdout
    assert "peft_lora_r64_scored" in done.stdout
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_part_that_fails_or_hangs_or_cannot_run_costs_no_other(
    gpu_session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_session, "describe", lambda device: {"gpu": {"cuda": False}})
    output = tmp_path / "results.json"
    saved: list[list[str]] = []
    write = gpu_session.write

    def spy(path: Path, results: dict[str, Any]) -> None:
        write(path, results)
        saved.append([part["status"] for part in json.loads(path.read_text())["parts"]])

    monkeypatch.setattr(gpu_session, "write", spy)
    fine = 'print(\'{"skipped": {}, "rows": [], "ratios": {}, "machine": "m", "matmul_floor_ms": 1}\')'
    hangs = "import sys, time; print('so far', file=sys.stderr, flush=True); time.sleep(60)"
    parts = [
        gpu_session.Part("hangs", ("-c", hangs), 2, ()),
        gpu_session.Part("fails", ("-c", "raise SystemExit(3)"), 9, ()),
        gpu_session.Part("lacks", ("-c", fine), 9, ("no_such_package",)),
        gpu_session.Part("fine", ("-c", fine), 9, ()),
    ]
    options = gpu_session.parse(["--device", "cpu", "--output", str(output)])
    assert gpu_session.session(parts, options) == 1
    assert saved[-1] == ["failed", "failed", "not run: no_such_package", "ok"]
    assert [status.count("not run: not reached") for status in saved] == [4, 3, 2, 1, 0]
    stopped = json.loads(output.read_text())["parts"][0]
    assert stopped["summary"] == "stopped after 2 s"
    assert "so far" in stopped["tail"]
    assert "not run: no_such_package" in capsys.readouterr().out


def test_without_a_gpu_the_session_says_so_and_writes_its_results(
    gpu_session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_session, "describe", lambda device: {"gpu": {"cuda": False, "device": None}})
    monkeypatch.setattr(gpu_session, "run_part", lambda *_: pytest.fail("must not run anything"))
    output = tmp_path / "new folder/results.json"
    assert gpu_session.main(["--output", str(output)]) == 1
    assert {part["status"] for part in json.loads(output.read_text())["parts"]} == {"not run: CUDA"}
    assert "A CUDA device must be there" in capsys.readouterr().out


def test_a_test_run_in_which_nothing_ran_is_not_ok(gpu_session: ModuleType) -> None:
    outcome = gpu_session.Outcome("attention", "ok")
    gpu_session.read_tests(outcome, "ss\n5 skipped in 0.1s\n")
    assert outcome.status == "not run: every test was skipped"
