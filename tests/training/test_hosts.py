"""Hosts that do not have the same data or versions are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl")

import torch.distributed as dist
from axolotl.utils.dict import DictDefault

from axolotl_mote.training import hosts


def process(host: str, data: str = "a1", version: str = "1.0") -> tuple[str, dict[str, Any]]:
    return host, {"axolotl-mote": version, hosts._DATA: data}


def test_hosts_that_agree_have_no_fault() -> None:
    assert hosts.fault_of_hosts([process("one"), process("one"), process("two")]) is None


def test_hosts_that_differ_are_named_with_what_to_do() -> None:
    found = [process("one"), process("two", data="b2"), process("three"), process("two", data="b2")]
    assert hosts.fault_of_hosts(found) == (
        "data, tokenizer and chat template must be the same on all hosts; got one, three: a1; two: b2. "
        "Copy the same files to all hosts."
    )
    assert hosts.fault_of_hosts([process("one"), process("two", version="2.0")]) == (
        "axolotl-mote must be the same on all hosts; got one: 1.0; two: 2.0. Install the same version everywhere."
    )
    assert hosts.fault_of_hosts([process("one"), process("two", data="b2", version="2.0")]) == (
        "axolotl-mote must be the same on all hosts; got one: 1.0; two: 2.0. Install the same version everywhere."
    )
    missing = [("one", {"data": "a"}), ("two", {"data": None})]
    assert "two: None" in str(hosts.fault_of_hosts(missing))


def test_every_process_compares_and_one_alone_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = DictDefault({"dataset_prepared_path": "prepared/0123456789ab", "output_dir": "none"})
    hosts.check_hosts(cfg)  # no group of processes
    own: list[Any] = []

    def gather(found: list[Any], value: Any) -> None:
        own.append(value)
        found[:] = [value, ("other", value[1] | {hosts._DATA: "ba9876543210"})]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(
        ValueError,
        match=r"^data, tokenizer and chat template must be the same on all hosts; got .*: 0123456789ab; other: ba98765",
    ):
        hosts.check_hosts(cfg)
    assert own[0][1][hosts._DATA] == "0123456789ab"
    assert own[0][1]["torch"]


def test_the_checkpoint_to_resume_from_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without shared storage only the first host's checkpoint is whole; the other would begin anew."""
    (tmp_path / "checkpoint-4").mkdir()
    cfg = DictDefault({"output_dir": str(tmp_path), "auto_resume_from_checkpoints": True})

    def gather(found: list[Any], value: Any) -> None:
        found[:] = [value, ("other", value[1] | {hosts._CHECKPOINT: "no checkpoint"})]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(ValueError, match=r"^the checkpoint to resume from must .*: checkpoint-4; other: no checkpoint"):
        hosts.check_hosts(cfg)
