"""What training saves finds its place before it trains, and a full disk is named and costs nothing that was there."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import mote
from safetensors.torch import load_file

pytest.importorskip("axolotl")

from axolotl.utils.dict import DictDefault
from test_trainer import WEIGHTS, build_trainer

from axolotl_mote.training import compat
from axolotl_mote.training.checkpoints import checkpoint_fault
from axolotl_mote.training.output import check_output, full_disk_named
from axolotl_mote.training.plugin import MotePlugin
from axolotl_mote.training.trainer import MoteTrainer

pytestmark = pytest.mark.smoke  # against every version that is supported

ADAPTER = "adapter_model.safetensors"


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """The operating system refuses to let any file grow beyond so many bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:  # pytest itself may write to a file
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- before training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "out", "out/of/many"])
def test_a_folder_that_takes_files_is_left_as_it_was(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_output(tmp_path / below)
    monkeypatch.chdir(tmp_path)
    check_output(Path(below))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "out", "out/of/many"])
def test_a_file_in_the_place_of_a_folder_is_refused(below: str, tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(
        ValueError, match=rf"^output_dir must be writable; got Not a directory at {place}\. Set another"
    ):
        check_output(place / below)


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    message = rf"^output_dir must be writable; got File too large at {tmp_path}\."
    with pytest.raises(ValueError, match=message), full_disk(100):
        check_output(tmp_path / "out")


@pytest.mark.parametrize("below", ["", "out"])
def test_a_link_to_nothing_is_refused(below: str, tmp_path: Path) -> None:
    place = tmp_path / "link"
    place.symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"^output_dir must be writable; got No such file or directory at {place}\."):
        check_output(place / below)


def test_a_home_that_only_some_expand_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^output_dir must be a whole path; got ~/out\. Write out what ~ stands for"):
        check_output(Path("~/out"))


def test_the_plugin_refuses_it_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    cfg: dict[str, Any] = {
        "adapter": "mote",
        "lora_r": 2,
        "lora_target_linear": True,
        "datasets": [{"path": "chains.jsonl", "type": "axolotl_mote.chain"}],
        "output_dir": str(tmp_path / "out"),
    }
    with pytest.raises(ValueError, match=r"^output_dir must be writable; got Not a directory at .*out\. Set another"):
        MotePlugin().register(cfg)


# --- while training -------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> MoteTrainer:
    """A trainer that may save checkpoint-0."""
    made = build_trainer(tmp_path, mote(), WEIGHTS)
    made.create_optimizer_and_scheduler(1)
    return made


def save(made: MoteTrainer) -> None:
    made._save_checkpoint(made.model, None)


NO_ROOM = (
    "^output_dir must have room for what training saves; got .*{}.* at {}. Free some, and go on from the last whole"
)


@pytest.mark.parametrize("size", [100, 9_000])
def test_a_checkpoint_without_room_is_named(size: int, tmp_path: Path, made: MoteTrainer) -> None:
    """The first file does not fit, or the adapter."""
    folder = tmp_path / "checkpoint-0"
    with pytest.raises(OSError, match=NO_ROOM.format("File too large", folder)), full_disk(size):
        save(made)
    assert checkpoint_fault(folder) == "trainer_state.json is missing"


def test_a_checkpoint_half_over_an_earlier_one_is_not_whole(tmp_path: Path, made: MoteTrainer) -> None:
    """Its other files would be those of another run. Of the disk torch tells nothing."""
    folder = tmp_path / "checkpoint-0"
    save(made)
    assert checkpoint_fault(folder) is None
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match=NO_ROOM.format("(unexpected pos|iostream error)", folder)):
        save(made)
    assert checkpoint_fault(folder) == "trainer_state.json is missing"


def test_an_earlier_checkpoint_stays_whole_if_nothing_of_this_step_is_saved(tmp_path: Path, made: MoteTrainer) -> None:
    save(made)
    next(p for p in made.model.parameters() if p.requires_grad).data[0] = float("nan")
    with pytest.raises(FloatingPointError):
        save(made)
    assert checkpoint_fault(tmp_path / "checkpoint-0") is None


def test_an_adapter_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """transformers asks for the first safetensors that write beside the file and rename."""
    model = mote()
    model.save_pretrained(tmp_path)
    before = load_file(tmp_path / ADAPTER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    with (
        pytest.raises(OSError, match=rf"^output_dir must .* got .*File too large .* at {tmp_path}\."),
        full_disk_named(tmp_path),
        full_disk((tmp_path / ADAPTER).stat().st_size - 1),
    ):
        model.save_pretrained(tmp_path)
    after = load_file(tmp_path / ADAPTER)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert sorted(after) == sorted(before)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA out of memory",
        "NCCL error in: x.cpp:94\nError while creating shared memory: No space left on device",
        "413 Client Error: File too large for url: https://example.org",
    ],
)
def test_other_errors_stay_as_they_are(said: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=re.escape(said)) as raised, full_disk_named(tmp_path):
        raise RuntimeError(said)
    assert str(raised.value) == said


def test_the_line_that_tells_of_the_disk_is_shown(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=NO_ROOM.format("disk: No space left", tmp_path)), full_disk_named(tmp_path):
        raise RuntimeError("cannot write\ndisk: No space left on device")


@pytest.mark.parametrize("name", ["save_initial_configs", "save_trained_model"])
def test_what_axolotl_saves_without_room_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl import train

    def save(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, name, save)
    MotePlugin().pre_model_load(DictDefault({"adapter": "mote", "output_dir": str(tmp_path)}))
    try:
        with pytest.raises(OSError, match=NO_ROOM.format("No space left on device", tmp_path)):
            getattr(train, name)(DictDefault({"output_dir": str(tmp_path)}), None, None)
    finally:
        compat.undo_patches()
    assert getattr(train, name) is save


def test_whoever_reads_the_configuration_may_read_the_weights(
    tmp_path: Path, made: MoteTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In checkpoints, and at the end."""
    from axolotl import train

    def modes(folder: Path) -> set[int]:
        return {(folder / name).stat().st_mode for name in (ADAPTER, "adapter_config.json")}

    save(made)
    assert len(modes(tmp_path / "checkpoint-0")) == 1
    made.model.save_pretrained(tmp_path)
    (tmp_path / ADAPTER).chmod(0o600)
    (tmp_path / "adapter_config.json").chmod(0o640)
    monkeypatch.setattr(train, "save_trained_model", lambda *_: None)
    MotePlugin().pre_model_load(DictDefault({"adapter": "mote", "output_dir": str(tmp_path)}))
    try:
        train.save_trained_model(DictDefault({"output_dir": str(tmp_path)}), None, None)
    finally:
        compat.undo_patches()
    assert {mode & 0o777 for mode in modes(tmp_path)} == {0o640}
