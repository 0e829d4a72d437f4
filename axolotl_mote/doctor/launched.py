"""Lines about several processes, which are started here: over gloo on CPUs, over NCCL on GPUs."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from axolotl_mote.doctor.lines import FAILED, NOT_APPLICABLE, OK, Finding, NotTestedError
from axolotl_mote.doctor.session import SHARDING, Session
from axolotl_mote.doctor.trained import (
    WEIGHTS,
    comparable_steps,
    compare_adapters,
    judge_adapters,
    reference_run,
    unmoved,
)

_START = 600.0  # seconds that processes may take to start, beside ten times what one process trains
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*)$", re.MULTILINE)


def check_processes(session: Session) -> Finding:
    """Several processes with the batches of one train the same adapter, sharded as it is configured."""
    key, sharded = session.sharding or ("micro_batch_size", "DDP")
    reference = reference_run(session)
    found = load_file(_launched(session) / WEIGHTS)
    if found.keys() != reference.after.keys() or any(found[n].shape != t.shape for n, t in reference.after.items()):
        return Finding(FAILED, "several processes save other tensors than one", key)
    return judge_adapters(
        compare_adapters(found, reference.after, reference.before, session.exact_run),
        f"{session.processes} processes, {sharded} over {'NCCL' if torch.cuda.is_available() else 'gloo'}",
        f"{session.processes} processes ({sharded}) train another adapter than one with the same batches",
        key,
    )


def check_sharding(session: Session) -> Finding:
    """What processes saved that shard is whole: every tensor in its full shape, and every expert moved."""
    if session.sharding is None:
        return Finding(NOT_APPLICABLE, "neither deepspeed nor fsdp_config is set")
    key, _ = session.sharding
    reference = reference_run(session)
    found = load_file(_launched(session) / WEIGHTS)
    faults = [f"{name} is missing" for name in sorted(reference.before.keys() - found.keys())]
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.before.items()}
    faults += [
        f"{name} has the shape {tuple(tensor.shape)} instead of {shapes[name]}"
        for name, tensor in sorted(found.items())
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    if not faults:
        # An expert that one process does not move either is the line of `training`.
        still, usual = (unmoved(reference.before, end, session.codec.steps) for end in (found, reference.after))
        faults = [
            f"{name}: shards that did not move ({layers[0]})" for name, layers in still.items() if name not in usual
        ]
    if faults:
        return Finding(FAILED, "; ".join(faults[:3]), key)
    return Finding(OK, f"{len(found)} tensors in their full shapes, every expert moved")


def _launched(session: Session) -> Path:
    """Output folder of a run of several processes with the batches of the reference.

    Raises:
        NotTestedError: If there are too few processes or GPUs.
        RuntimeError: If a process failed, or none ended in time.
    """
    if session.processes < 2:
        raise NotTestedError("switched off by --no-processes")
    if torch.cuda.is_available() and session.gpus < session.processes:
        raise NotTestedError(f"{session.processes} processes need as many GPUs; there are {session.gpus}")
    return session.once("run of several processes", lambda: _launch(session))


def _launch(session: Session) -> Path:
    reference = reference_run(session)
    steps, accumulation = comparable_steps(session)
    schedule = {"max_steps": steps, "gradient_accumulation_steps": accumulation}
    sharding = {key: session.raw.get(key) for key in SHARDING}
    file = session.write("processes", session.comparable() | schedule | sharding)
    log = session.folder / "processes.log"
    with _port() as port, log.open("wb") as out:
        variables: dict[str, object] = {"WORLD_SIZE": session.processes, "LOCAL_WORLD_SIZE": session.processes}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        running = []
        try:
            for rank in range(session.processes):
                own = {name: str(value) for name, value in (variables | {"RANK": rank, "LOCAL_RANK": rank}).items()}
                environment = {k: v for k, v in session.environment.items() if k not in _LAUNCHER} | own
                # Not the user's: DeepSpeed builds extensions, and waits for the lock of a build that was killed.
                environment |= {"TORCH_EXTENSIONS_DIR": str(session.folder / "extensions")}
                command = [sys.executable, "-m", "axolotl.cli.train", str(file)]
                running.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
                    )
                )
            code = _wait(running, _START + 10 * reference.seconds)
        finally:
            for process in running:
                process.kill()
            for process in running:
                process.wait()
    if code != 0:
        raise RuntimeError(_last_error(log) or f"a process ended with status {code}")
    return session.folder / "processes"


def _wait(running: list[subprocess.Popen[bytes]], seconds: float) -> int:
    """Status of the first process that fails, or 0 once all have ended.

    Raises:
        RuntimeError: If they do not end in time.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in running]
        if any(codes):
            return next(code for code in codes if code)
        if None not in codes:
            return 0
        time.sleep(0.2)
    raise RuntimeError(f"the processes did not end within {seconds:.0f} s: they wait for each other")


@contextmanager
def _port() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        number = int(sock.getsockname()[1])
    yield number


def _last_error(log: Path) -> str:
    found = _ERROR.findall(log.read_text(encoding="utf-8", errors="replace"))
    return found[-1] if found else ""


CHECKS: dict[str, Callable[[Session], Finding]] = {"processes": check_processes, "sharding": check_sharding}
