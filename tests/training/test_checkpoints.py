"""A run resumes from a whole checkpoint only, whatever a killed run left behind."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("axolotl")

from axolotl.utils.dict import DictDefault

from axolotl_mote.training.checkpoints import checkpoint_fault, choose_checkpoint

FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "training_args.bin", "global_step3/rank_0.pt")


def write(folder: Path, step: int) -> Path:
    """A checkpoint as transformers and DeepSpeed write it."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "global_step3").mkdir(parents=True)
    for name in FILES:
        values = {"weight": torch.arange(500.0)}
        if name.endswith(".safetensors"):
            save_file(values, checkpoint / name)
        else:
            torch.save(values, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def tear(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def config(folder: Path, **values: Any) -> Any:
    return DictDefault({"output_dir": str(folder)} | values)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", [*FILES, "trainer_state.json"])
def test_every_torn_file_is_named(name: str, keep: float, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 3)
    assert checkpoint_fault(checkpoint) is None
    tear(checkpoint / name, keep)
    assert checkpoint_fault(checkpoint) == f"{name} is torn"


def test_files_in_torchs_older_format_are_taken(tmp_path: Path) -> None:
    """DeepSpeed writes them with checkpoint_serialization: false."""
    checkpoint = write(tmp_path, 3)
    torch.save({"a": torch.ones(3)}, checkpoint / "global_step3/rank_0.pt", _use_new_zipfile_serialization=False)
    assert checkpoint_fault(checkpoint) is None


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        (None, "trainer_state.json is missing"),
        ("[]", "trainer_state.json is torn"),
        ("{}", "trainer_state.json is torn"),
        ("[" * 100_000, "trainer_state.json is torn"),
        ('{"global_step": 2}', "trainer_state.json is of step 2"),
    ],
)
def test_the_state_must_be_that_of_the_checkpoint(state: str | None, fault: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 3)
    (checkpoint / "trainer_state.json").unlink()
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    assert checkpoint_fault(checkpoint) == fault


def test_a_named_checkpoint_that_is_torn_is_refused_with_the_last_whole_one(tmp_path: Path) -> None:
    write(tmp_path, 2)
    whole, torn = write(tmp_path, 10), write(tmp_path, 11)
    tear(torn / "optimizer.pt")
    with pytest.raises(ValueError, match=rf"^resume_from_checkpoint must .*: optimizer\.pt is torn\. Use {whole}\.$"):
        choose_checkpoint(config(tmp_path, resume_from_checkpoint=str(torn)))
    choose_checkpoint(config(tmp_path, resume_from_checkpoint=str(whole)))
    for name in (2, 10):
        tear(tmp_path / f"checkpoint-{name}/optimizer.pt")
    with pytest.raises(ValueError, match=r"Start anew\.$"):
        choose_checkpoint(config(tmp_path, resume_from_checkpoint=str(torn)))


def test_auto_resume_takes_the_last_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from axolotl.utils.train import determine_last_checkpoint

    cfg = config(tmp_path, auto_resume_from_checkpoints=True)
    choose_checkpoint(cfg)  # there is none yet
    assert determine_last_checkpoint(cfg) is None
    folders = {step: write(tmp_path, step) for step in (2, 9, 10)}

    def chosen() -> str | None:
        cfg = config(tmp_path, auto_resume_from_checkpoints=True)
        choose_checkpoint(cfg)
        return determine_last_checkpoint(cfg)

    assert chosen() == str(folders[10])
    (folders[10] / "trainer_state.json").unlink()
    with caplog.at_level(logging.WARNING, "axolotl.mote"):
        assert chosen() == str(folders[9])
    assert "checkpoint-10 is not resumed from: trainer_state.json is missing" in caplog.text
    for step in (2, 9):
        tear(folders[step] / "adapter_model.safetensors")
    assert chosen() is None
    cfg = config(tmp_path)
    choose_checkpoint(cfg)  # a run that does not resume
    assert determine_last_checkpoint(cfg) is None
