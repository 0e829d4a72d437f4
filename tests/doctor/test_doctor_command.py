"""The command as a user calls it: what it prints, its exit status, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from click.testing import CliRunner, Result
from doctor_kit import write_tiny_config

from axolotl_mote.cli import main
from axolotl_mote.doctor import reading, run
from axolotl_mote.doctor import session as session_module
from axolotl_mote.doctor.lines import LINES, choose
from axolotl_mote.doctor.session import Session


def doctor(*args: Any) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, args)])


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The command changes its process for good, and ``datasets`` keeps the first cache that it was told."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    for name in ("HF_DATASETS_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "AXOLOTL_TEE_STDOUT"):
        monkeypatch.setenv(name, "")


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_it_leaves_everything_but_a_temporary_folder_alone(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_tiny_config(tmp_path, tiny_folder)
    before = files(tmp_path)
    done = doctor(config, "--only", "config", "--only", "data", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(line["line"], line["verdict"]) for line in found["lines"]] == [("config", "ok"), ("data", "ok")]
    assert files(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_failed_line_names_the_key_and_sets_the_status(tmp_path: Path, tiny_folder: Path) -> None:
    done = doctor(write_tiny_config(tmp_path, tiny_folder, sequence_len=80), "--only", "data")
    assert done.exit_code == 1
    assert "Change: sequence_len" in " ".join(done.output.replace("│", " ").split())


def test_a_check_that_breaks_is_a_failed_line_and_the_others_go_on(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(session: Session) -> Any:
        raise RuntimeError("first line\nthe last line")

    monkeypatch.setitem(run.CHECKS, "config", broken)
    done = doctor(write_tiny_config(tmp_path, tiny_folder), "--only", "config", "--only", "versions", "--json")
    versions, config = json.loads(done.stdout)["lines"]
    assert (versions["verdict"], config["verdict"], config["text"]) == ("ok", "failed", "RuntimeError: the last line")
    assert done.exit_code == 1


def test_an_interrupt_exits_with_130(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(session: Session) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(run.CHECKS, "versions", interrupted)
    assert doctor(write_tiny_config(tmp_path, tiny_folder), "--only", "versions").exit_code == 130


def test_versions_outside_of_the_tested_ones_are_named(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(write_tiny_config(tmp_path, tiny_folder), tmp_path)
    monkeypatch.setattr(reading, "installed_versions", lambda names: {"peft": "0.1", "torch": "2.13.0+cpu"})
    found = reading.check_versions(session)
    assert found.verdict == "not tested"
    assert "peft 0.1 (tested: " in found.text
    assert "torch 2.13.0+cpu (" not in found.text


def test_without_axolotl_it_says_what_to_install(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "find_spec", lambda name: None)
    done = doctor(write_tiny_config(tmp_path, tiny_folder), "--only", "versions")
    assert done.exit_code == 1
    assert "pip install '.[train]'" in done.output


def test_usage(tmp_path: Path) -> None:
    assert choose(["saving", "data"], ["saving"]) == ["data"]
    (tmp_path / "list.yml").write_text("- 1\n")
    done = doctor(tmp_path / "list.yml", "--only", "versions")
    assert done.exit_code == 1
    assert "CONFIG must be a mapping of keys; got list" in done.output
    assert doctor(tmp_path / "list.yml", "--only", "data", "--skip", "data").exit_code == 2
    assert doctor(tmp_path / "list.yml", "--only", "dat").exit_code == 2
    help_text = doctor("--help").output
    assert all(name in help_text for name in LINES)
    assert "mote doctor mote.yml" in help_text
