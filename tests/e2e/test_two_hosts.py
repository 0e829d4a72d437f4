"""Two hosts: namespaces of this machine, each with a name, an address and files, and a virtual cable between them.

What is not mounted over is shared, as on a cluster's storage. `make two-hosts` runs it, as root. torchrun's agents are
started on both hosts; DeepSpeed's launcher is started on the first one and reaches both by ssh.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
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
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH')}:/usr/sbin")
needs_ssh = pytest.mark.skipif(not (SSHD and shutil.which("pdsh")), reason="it needs openssh-server and pdsh")
SSH_CONFIG = """\
IdentityFile {home}/key
UserKnownHostsFile {home}/known_hosts
StrictHostKeyChecking accept-new
ServerAliveInterval 10
"""
LAUNCHERS = ["torchrun", pytest.param("deepspeed", marks=needs_ssh)]
EXPORTED = "PATH|OMP_NUM_THREADS|HF_HUB_OFFLINE|AXOLOTL_DO_NOT_TRACK|DS_ACCELERATOR|TORCH_EXTENSIONS_DIR|MOTE_E2E_RUN"
"""What DeepSpeed's launcher sets on all hosts; the last lets a test end what was started by ssh."""
LONG = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 50}


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True)


class Hosts:
    """Two hosts that are linked; root's home is a folder that both share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.servers: list[Command] = []
        self.names = (f"mote{os.getpid()}a", f"mote{os.getpid()}b")
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", self.names[0], "type", "veth", "peer", "cable", "netns", self.names[1])
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        table = "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, self.names, strict=True))
        (folder / "hosts").write_text(table)
        (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in self.names))
        (folder / "passwd").write_text(Path("/etc/passwd").read_text().replace(":/root:", f":{self.home}:", 1))
        # sshd lets nobody in whose password is locked by "!".
        (folder / "shadow").write_text("root:*:20000:0:99999:7:::\n")
        (self.home / ".ssh").mkdir(parents=True)
        (self.home / ".ssh" / "config").write_text(SSH_CONFIG.format(home=self.home))

    def cut(self) -> None:
        """Cut the cable."""
        ip("-n", self.names[0], "link", "set", "cable", "down")

    def processes(self, number: int) -> list[psutil.Process]:
        """What runs on a host, however it was started."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[number]], check=True, capture_output=True, text=True)
        pids = {int(pid) for pid in listed.stdout.split()}
        return [process for process in psutil.process_iter(["name", "environ"]) if process.pid in pids]

    def kill_rank(self, number: int) -> None:
        """Kill the process that trains on a host and what it started, and neither its launcher nor the ssh session."""
        trains = [p for p in self.processes(number) if (p.info["environ"] or {}).get("RANK") == str(number)]
        assert trains
        for process in trains:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def wait_until_idle(self, timeout: float = 60) -> None:
        """Wait until nothing but sshd runs on either host."""
        end = time.monotonic() + timeout
        while left := [p for number in range(2) for p in self.processes(number) if p.info["name"] != "sshd"]:
            assert time.monotonic() < end, f"still running: {left}"
            time.sleep(0.2)

    def close(self) -> None:
        for number, name in enumerate(self.names):
            for process in self.processes(number):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            subprocess.run(["ip", "netns", "del", name], check=False)
        for server in self.servers:
            server.kill()

    def start(self, number: int, command: list[Any], log: Path, cwd: Path, mounts: dict[Path, Path]) -> Command:
        """Start a command on a host.

        Args:
            number: Of the host.
            command: What to start.
            log: Takes what it prints.
            cwd: Working folder.
            mounts: What this command alone sees in place of other files.
        """
        over = {Path("/etc") / name: self.folder / name for name in ("hosts", "passwd", "shadow")} | mounts
        script = [f"hostname {self.names[number]}"]
        script += [f"mount --bind {own} {place}" for place, own in over.items()]
        # sshd separates its privileges in /run/sshd.
        script += ["mount -t tmpfs run /run", "mkdir /run/sshd"]
        script += ["export GLOO_SOCKET_IFNAME=cable", f"export HOME={self.home}"]
        script += [f"env | grep -E '^({EXPORTED})=' > {self.home}/.deepspeed_env", 'exec "$@"']
        enter = ["ip", "netns", "exec", self.names[number], "unshare", "-u", "-m", "sh", "-ec", "\n".join(script), "sh"]
        return Command([*enter, *command], log, cwd)

    def start_both(self, commands: list[Any], config: Path, cwd: Path, mounts: dict[Path, Path]) -> list[Command]:
        """Start a command on each host, with a log beside the configuration; the mounts are those of the second."""
        logs = [config.with_name(f"host{number}.log") for number in range(2)]
        return [self.start(n, commands[n], logs[n], cwd, mounts if n else {}) for n in range(2)]

    def torchrun(self, config: Path, cwd: Path, mounts: dict[Path, Path]) -> list[Command]:
        """Start torchrun's agents, one on each host; the mounts are those of the second."""
        rendezvous = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_id", "mote"]
        rendezvous += ["--rdzv_endpoint", f"{ADDRESSES[0]}:29500", "--local_addr"]
        command = [BIN / "axolotl", "train", config, "--launcher", "torchrun", "--", *rendezvous]
        return self.start_both([[*command, address] for address in ADDRESSES], config, cwd, mounts)

    def deepspeed(self, config: Path, cwd: Path, mounts: dict[Path, Path]) -> list[Command]:
        """Start DeepSpeed's launcher on the first host; the mounts are those of the second, where ssh leads."""
        self.serve_ssh(cwd, mounts)
        launch = [BIN / "deepspeed", "--hostfile", self.folder / "hostfile", "--module", "axolotl.cli.train", config]
        return [self.start(0, launch, config.with_name("host0.log"), cwd, {})]

    def deepspeed_without_ssh(self, config: Path, cwd: Path, mounts: dict[Path, Path]) -> list[Command]:
        """Start DeepSpeed's launcher on both hosts; the mounts are those of the second."""
        launch = [BIN / "deepspeed", "--hostfile", self.folder / "hostfile", "--no_ssh", "--master_addr", ADDRESSES[0]]
        train = ["--module", "axolotl.cli.train", config]
        return self.start_both([[*launch, "--node_rank", n, *train] for n in range(2)], config, cwd, mounts)

    def serve_ssh(self, cwd: Path, mounts: dict[Path, Path]) -> None:
        """Start sshd on both hosts, with keys of their own; the mounts are those of the second."""
        for key in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.home / key], check=True)
        options = [f"HostKey={self.home}/host_key", f"AuthorizedKeysFile={self.home}/key.pub", "StrictModes=no"]
        options += ["PasswordAuthentication=no", "PidFile=none"]
        command = [SSHD, "-D", "-e", "-f", "/dev/null", *(word for option in options for word in ("-o", option))]
        for number in range(2):
            server = self.start(number, command, self.folder / f"sshd{number}.log", cwd, mounts if number else {})
            self.servers.append(server)
            server.wait_for(lambda server=server: "Server listening" in server.text())


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
    """The same training on both hosts.

    Args:
        mounts: What the second host alone sees in place of other files.
        launcher: A method of ``Hosts``; torchrun has a log for each host, DeepSpeed's launcher one for both.
    """

    def __init__(
        self,
        hosts: Hosts,
        workshop: Any,
        name: str,
        mounts: dict[Path, Path] | None = None,
        launcher: str = "torchrun",
        **changes: Any,
    ) -> None:
        config = workshop.config(name, micro_batch_size=1, **changes)
        self.runs = getattr(hosts, launcher)(config, workshop.repo, mounts or {})

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


def test_deepspeed_without_ssh_equals_one_process(hosts: Hosts, runs: Any, workshop: Any) -> None:
    for result in Pair(hosts, workshop, "no_ssh", launcher="deepspeed_without_ssh").wait():
        result.ok()
    assert largest_difference(runs.get("reference"), workshop.output("no_ssh")) < TOLERANCE


@needs_ssh
@pytest.mark.parametrize("stage", [None, "zero2"])
def test_two_hosts_by_ssh_equal_one_process(hosts: Hosts, runs: Any, workshop: Any, stage: str | None) -> None:
    name = f"deepspeed_{stage or 'ddp'}"
    sharded = {"deepspeed": workshop.deepspeed(stage)} if stage else {}
    (result,) = Pair(hosts, workshop, name, launcher="deepspeed", **sharded).wait()
    log = result.ok().log
    assert all(f"{host}: " in log for host in hosts.names)
    hosts.wait_until_idle()
    assert largest_difference(runs.get("reference"), workshop.output(name)) < TOLERANCE


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
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cut_ends_both_and_training_resumes(hosts: Hosts, runs: Any, workshop: Any, launcher: str, what: str) -> None:
    """Six steps in all, as the reference: those up to a checkpoint before the cut, and the rest in one process."""
    name = f"{launcher}_cut_{what}"
    pair = Pair(hosts, workshop, name, launcher=launcher, **LONG, **SOON)
    checkpoint = workshop.output(name) / "checkpoint-2"
    pair.wait_for((checkpoint / "trainer_state.json").is_file)
    if what == "cable":
        hosts.cut()
    elif launcher == "torchrun":
        pair.runs[1].kill()
    else:
        hosts.kill_rank(1)
    results = pair.wait(240)
    assert ended_by_itself(results[0])
    if launcher == "deepspeed":
        # ServerAliveInterval lets ssh give the other host up, and the launcher end with it.
        assert what == "rank" or f"Timeout, server {hosts.names[1]} not responding" in results[0].log
        hosts.wait_until_idle()
    elif what == "cable":
        # torchrun's agent waits on for the store on the other host; what it had started has ended.
        assert re.search(r"\[rank1\]: RuntimeError: .*Timed out waiting 30000ms", results[1].log)
    assert not (workshop.output(name) / "adapter_model.safetensors").exists()
    for path in workshop.output(name).glob("checkpoint-*"):
        if path != checkpoint:
            shutil.rmtree(path)
    changes = {"save_strategy": "steps", "save_steps": 2}
    workshop.run("train", name, auto_resume_from_checkpoints=True, **changes).ok()
    assert largest_difference(runs.get("reference"), workshop.output(name)) < TOLERANCE
