"""Two hosts: namespaces of this machine, each with a name, an address and files, and a virtual cable between them.

What is not mounted over is shared, as on a cluster's storage. `make two-hosts` runs it, as root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .commands import BIN, Command
from .compare import largest_difference

pytestmark = [
    pytest.mark.skipif(os.environ.get("TWO_HOSTS") != "1", reason="make two-hosts runs it, as root"),
    pytest.mark.needs("reference"),
]

TOLERANCE = 1e-4
ADDRESSES = ("10.77.0.1", "10.77.0.2")
STEPS = 400
SOON = {"ddp_timeout": 30}
LONG = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 50}


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True)


class Hosts:
    """Two hosts that are linked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = (f"mote{os.getpid()}a", f"mote{os.getpid()}b")
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", self.names[0], "type", "veth", "peer", "cable1", "netns", self.names[1])
        for number, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[number]}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"cable{number}", "up")
        table = "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, self.names, strict=True))
        (folder / "hosts").write_text(table)

    def cut(self) -> None:
        """Cut the cable."""
        ip("-n", self.names[0], "link", "set", "cable0", "down")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def start(self, number: int, config: Path, log: Path, cwd: Path, mounts: dict[Path, Path] | None = None) -> Command:
        """Start torchrun's agent on a host.

        Args:
            number: Of the host.
            config: What to train.
            log: Takes what it prints.
            cwd: Working folder.
            mounts: What this host alone sees in place of other files.
        """
        rendezvous = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_id", "mote"]
        rendezvous += ["--rdzv_endpoint", f"{ADDRESSES[0]}:29500", "--local_addr", ADDRESSES[number]]
        command = [BIN / "axolotl", "train", config, "--launcher", "torchrun", "--", *rendezvous]
        over = {Path("/etc/hosts"): self.folder / "hosts", **(mounts or {})}
        script = [f"hostname {self.names[number]}"]
        script += [f"mount --bind {own} {place}" for place, own in over.items()]
        script += [f"export GLOO_SOCKET_IFNAME=cable{number}", 'exec "$@"']
        enter = ["ip", "netns", "exec", self.names[number], "unshare", "-u", "-m", "sh", "-ec", "\n".join(script), "sh"]
        return Command([*enter, *command], log, cwd)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    try:
        yield made
    finally:
        made.close()


def ended_by_itself(result: Any) -> bool:
    """Whether a run failed, instead of waiting until the test killed it."""
    return result.returncode != 0 and "(killed after" not in result.log


class Pair:
    """The same training on both hosts."""

    def __init__(self, hosts: Hosts, workshop: Any, name: str, mounts: dict[Path, Path] | None = None, **changes: Any):
        config = workshop.config(name, micro_batch_size=1, **changes)
        self.logs = [workshop.folder / name / f"host{number}.log" for number in range(2)]
        self.runs = [hosts.start(n, config, self.logs[n], workshop.repo, mounts if n else None) for n in range(2)]

    def wait(self, timeout: float = 300) -> list[Any]:
        try:
            return [run.wait(timeout) for run in self.runs]
        finally:
            for run in self.runs:
                run.kill()

    def wait_for(self, condition: Any) -> None:
        self.runs[0].wait_for(condition)


def test_two_hosts_equal_one_process(hosts: Hosts, runs: Any, workshop: Any) -> None:
    for result in Pair(hosts, workshop, "two_hosts").wait():
        result.ok()
    assert largest_difference(runs.get("reference"), workshop.output("two_hosts")) < TOLERANCE


def test_other_data_on_one_host_is_refused_by_its_name(hosts: Hosts, workshop: Any, tmp_path: Path) -> None:
    own = tmp_path / "chains.jsonl"
    own.write_bytes(workshop.chains.read_bytes().replace(b"the", b"THE", 1))
    results = Pair(hosts, workshop, "other_data", {workshop.chains: own}).wait()
    for result in results:
        assert ended_by_itself(result)
        assert "data, tokenizer and chat template must be the same on all hosts; got" in result.log
        assert all(name in result.log for name in hosts.names)
    assert not list(workshop.output("other_data").rglob("adapter_model.safetensors"))


def test_a_host_without_the_data_ends_both(hosts: Hosts, workshop: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    results = Pair(hosts, workshop, "no_data", {workshop.chains.parent: empty}, **SOON).wait()
    assert all(ended_by_itself(result) for result in results)
    assert str(workshop.chains) in results[1].log
    assert re.search(rf"host +: {hosts.names[1]}", results[1].log)
    assert not list(workshop.output("no_data").rglob("adapter_model.safetensors"))


@pytest.mark.parametrize("what", ["cable", "rank"])
def test_a_cut_ends_both_and_training_resumes(hosts: Hosts, runs: Any, workshop: Any, what: str) -> None:
    """Six steps in all, as the reference: those up to a checkpoint before the cut, and the rest in one process."""
    name = f"cut_{what}"
    pair = Pair(hosts, workshop, name, **LONG, **SOON)
    checkpoint = workshop.output(name) / "checkpoint-2"
    pair.wait_for((checkpoint / "trainer_state.json").is_file)
    if what == "cable":
        hosts.cut()
    else:
        pair.runs[1].kill()
    results = pair.wait(240)
    assert ended_by_itself(results[0])
    # Without the cable, torchrun's agent waits on for the store on the other host; what it had started has ended.
    assert what == "rank" or re.search(r"\[rank1\]: RuntimeError: .*Timed out waiting 30000ms", results[1].log)
    assert not (workshop.output(name) / "adapter_model.safetensors").exists()
    for path in workshop.output(name).glob("checkpoint-*"):
        if path != checkpoint:
            shutil.rmtree(path)
    changes = {"save_strategy": "steps", "save_steps": 2}
    workshop.run("train", name, auto_resume_from_checkpoints=True, **changes).ok()
    assert largest_difference(runs.get("reference"), workshop.output(name)) < TOLERANCE
