"""Lines that start processes, on the tiny model: right with ZeRO-3, and each fault of the processes is named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from doctor_kit import write_tiny_config

from axolotl_mote.doctor.lines import FAILED, OK
from axolotl_mote.doctor.run import run_lines
from axolotl_mote.doctor.session import Session
from axolotl_mote.training import trainer

pytestmark = pytest.mark.e2e

Open = Callable[..., Session]
PLUGIN = """\
import axolotl_mote.training.trainer as trainer
from axolotl.integrations.base import BasePlugin
{body}

class Broken(BasePlugin):
    pass
"""
WRONG_SCALE = """
right = trainer.weighted_loss
trainer.weighted_loss = lambda losses, weights, total=None, ranks=1: right(losses, weights, total, 1)
"""
NO_START = """
import os
if "RANK" in os.environ:
    raise OSError("this rank does not start")
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Plugins of a configuration, one of which breaks every process that loads it."""

    def plugins(body: str) -> list[str]:
        (tmp_path / "broken_plugin.py").write_text(PLUGIN.format(body=body), encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
        monkeypatch.setattr(trainer, "weighted_loss", trainer.weighted_loss)  # it comes back after the test
        return ["axolotl_mote.MotePlugin", "broken_plugin.Broken"]

    return plugins


ZERO3 = {"deepspeed": str(Path(__file__).parents[2] / "example_configs" / "deepspeed" / "zero3.json")}
FSDP2 = {"fsdp_version": 2, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}


@pytest.mark.parametrize("sharding", [ZERO3, FSDP2], ids=["ZeRO-3", "FSDP2"])
def test_processes_that_shard(open_session: Open, sharding: dict[str, Any]) -> None:
    session = open_session(processes=2, **sharding)
    found = list(run_lines(session, ["processes", "sharding"]))
    assert [finding.verdict for finding in found] == [OK, OK], [finding.text for finding in found]


def test_a_loss_that_ignores_the_number_of_processes(open_session: Open, broken: Callable[[str], list[str]]) -> None:
    (found,) = run_lines(open_session(processes=2, plugins=broken(WRONG_SCALE)), ["processes"])
    assert (found.verdict, found.key) == (FAILED, "micro_batch_size")
    assert "train another adapter than one" in found.text


def trains(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
        return "axolotl.cli.train" in process.cmdline()
    return False


def test_after_an_interrupt_nothing_is_left(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_tiny_config(tmp_path, tiny_folder)
    command = [sys.executable, "-m", "axolotl_mote.cli", "doctor", str(config), "--only", "processes"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "tmp").mkdir()
    # A shell without job control starts its background jobs with SIGINT ignored, and so are their children.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, env=environment, preexec_fn=heard, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as doctor:
        workers: list[psutil.Process] = []
        while len(workers) < 2 and doctor.poll() is None:
            below = psutil.Process(doctor.pid).children(recursive=True)
            workers = [child for child in below if trains(child)]
            time.sleep(0.2)
        doctor.send_signal(signal.SIGINT)
        assert doctor.wait(60) == 130
    assert len(workers) == 2
    assert not any(psutil.pid_exists(worker.pid) for worker in workers)
    assert list((tmp_path / "tmp").glob("mote_doctor_*")) == []


def test_a_process_that_does_not_start(open_session: Open, broken: Callable[[str], list[str]]) -> None:
    (found,) = run_lines(open_session(processes=2, plugins=broken(NO_START)), ["processes"])
    assert found.verdict == FAILED
    assert "this rank does not start" in found.text
