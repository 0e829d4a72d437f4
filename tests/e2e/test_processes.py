"""Two processes train what one process trains, whatever shards the state, and a killed run goes on where it was.

The batches are the same (one process x micro-batch 2, two processes x micro-batch 1); in some of them one rank's chain
lacks a step (see ``twelve_chains``). Step dropout and random question routing are on.
"""

from __future__ import annotations

from typing import Any

import pytest

from .commands import BIN, Command, free_port
from .compare import largest_difference

TOLERANCE = 1e-4

SMALL_CHUNKS = """\
import axolotl_mote.model.loss
from axolotl.integrations.base import BasePlugin

axolotl_mote.model.loss.chunk_size = lambda vocab_size: 160


class SmallChunks(BasePlugin):
    pass
"""


@pytest.mark.needs("reference")
@pytest.mark.parametrize("stage", [None, "zero1", "zero2", "zero3", "zero3_cpu_offload"])
def test_two_processes_equal_one(runs: Any, workshop: Any, stage: str | None) -> None:
    sharded = {"deepspeed": workshop.deepspeed(stage)} if stage else {}
    train = workshop.train if stage else workshop.train_as_a_user
    found = train(f"two_{stage or 'ddp'}", processes=2, **sharded)
    assert largest_difference(runs.get("reference"), found) < TOLERANCE


@pytest.mark.needs("reference")
def test_zero3_where_the_loss_would_come_in_chunks(runs: Any, workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank's chains fit into a chunk and the other's do not; both must gather the head equally often."""
    (workshop.folder / "small_chunks.py").write_text(SMALL_CHUNKS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(workshop.folder))
    plugins = ["axolotl_mote.MotePlugin", "small_chunks.SmallChunks"]
    found = workshop.train(
        "chunks", processes=2, deepspeed=workshop.deepspeed("zero3"), plugins=plugins, gradient_checkpointing=True
    )
    assert largest_difference(runs.get("reference"), found) < TOLERANCE


@pytest.mark.needs("accumulated")
def test_two_processes_equal_one_with_accumulation(runs: Any, workshop: Any) -> None:
    found = workshop.train("two_accumulated", processes=2, gradient_accumulation_steps=2)
    assert largest_difference(runs.get("accumulated"), found) < TOLERANCE


@pytest.mark.needs("reference", "resumed")
def test_a_killed_run_resumes(runs: Any) -> None:
    assert largest_difference(runs.get("reference"), runs.get("resumed")) < TOLERANCE


@pytest.mark.needs("reference")
@pytest.mark.parametrize(("stage", "auto"), [("zero2", True), ("zero3", False)])
def test_killed_processes_resume(runs: Any, workshop: Any, stage: str, auto: bool) -> None:
    sharded = {"deepspeed": workshop.deepspeed(stage)}
    found = workshop.train_killed_and_resumed(f"resumed_{stage}", processes=2, auto=auto, **sharded)
    assert largest_difference(runs.get("reference"), found) < TOLERANCE


@pytest.mark.needs("reference", "accumulated")
def test_the_comparison_can_fail(runs: Any) -> None:
    assert largest_difference(runs.get("reference"), runs.get("accumulated")) > 100 * TOLERANCE


@pytest.mark.needs("reference")
def test_two_agents_train_together(runs: Any, workshop: Any) -> None:
    config = workshop.config("agents", micro_batch_size=1)
    rendezvous = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_id", "mote"]
    rendezvous += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--local_addr", "127.0.0.1"]
    args = [BIN / "axolotl", "train", config, "--launcher", "torchrun", "--", *rendezvous]
    logs = [workshop.folder / "agents" / f"agent{number}.log" for number in range(2)]
    agents = [Command(args, log, workshop.repo) for log in logs]
    try:
        for agent in agents:
            agent.wait().ok()
    finally:
        for agent in agents:
            agent.kill()
    saved = list(workshop.output("agents").rglob("adapter_model.safetensors"))
    assert saved == [workshop.output("agents") / "adapter_model.safetensors"]
    assert largest_difference(runs.get("reference"), workshop.output("agents")) < TOLERANCE
