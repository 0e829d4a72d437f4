"""Starting axolotl: as a user does, or as forks of one process that has imported everything.

Both leave a log and an exit code. A fork runs the same code as the command line, `axolotl ...` or, for a worker of
torchrun, `python -m axolotl.cli.train`; only the start of the interpreter and the imports are shared. A fork changes
nothing in the process that it comes from, so one run cannot affect the next.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
TIMEOUT = 300  # seconds of one command, on a busy machine
EXTENSIONS = tempfile.TemporaryDirectory(prefix="torch_extensions_")
FORKS = multiprocessing.get_context("forkserver")


def environment() -> dict[str, str]:
    """One thread per process, nothing downloaded, no launcher's variables inherited."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {key: value for key, value in os.environ.items() if key not in launcher}
    return {
        **inherited,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "FORCE_COLOR": "1",
        "TERM": "xterm",
        "COLUMNS": "300",
        "PYTHONFAULTHANDLER": "1",
        # Not the user's: PyTorch waits for ever for the lock of a build that was killed.
        "TORCH_EXTENSIONS_DIR": EXTENSIONS.name,
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Result:
    """What a run left: its exit code and everything it printed."""

    returncode: int
    log: str

    def ok(self) -> Result:
        assert self.returncode == 0, f"exit code {self.returncode}; the log ends with\n{self.log[-4000:]}"
        return self


RUNNING: set[Run] = set()


class Run:
    """A run in progress; nothing that it started survives the test."""

    def __init__(self, log: Path) -> None:
        self.log = log
        RUNNING.add(self)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        raise NotImplementedError

    def signal(self, number: int) -> None:
        """Signal every process of the run."""
        raise NotImplementedError

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        RUNNING.discard(self)

    def wait(self, timeout: float = TIMEOUT) -> Result:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.signal(signal.SIGABRT)  # faulthandler writes where each thread hangs
                time.sleep(1)
                self.kill()
                return Result(-1, f"{self.text()}\n(killed after {timeout} s)")
            time.sleep(0.05)
        self.kill()
        return Result(code, self.text())

    def wait_for(self, condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
        """Wait until something has happened; the run must still be in progress then."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end or self.poll() is not None:
                self.kill()
                raise AssertionError(f"the run ended or hung too early; its log ends with\n{self.text()[-4000:]}")
            time.sleep(0.05)


@atexit.register
def leave_nothing_running() -> None:
    """Also after an interrupt, when no test waits for its run any more."""
    for run in list(RUNNING):
        run.kill()


class Command(Run):
    """A command line in a process of its own."""

    def __init__(self, args: list[Any], log: Path, cwd: Path) -> None:
        super().__init__(log)
        self.token = uuid.uuid4().hex
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [str(x) for x in args],
                cwd=cwd,
                env={**environment(), "MOTE_E2E_RUN": self.token},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def poll(self) -> int | None:
        return self.process.poll()

    def signal(self, number: int) -> None:
        """Signal the command and all that it started; torchrun's workers are in sessions of their own.

        sshd writes its state over its environment, so the command itself is known by its number.
        """
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid == self.process.pid or process.environ().get("MOTE_E2E_RUN") == self.token:
                    process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()


class Forks(Run):
    """Forks of the process that has imported everything: one for a command, or one for each worker of torchrun.

    Args:
        args: ``sys.argv``: of ``axolotl``, or of ``python -m axolotl.cli.train`` where there are several workers.
        log: Takes what all of them print.
        cwd: Working folder.
        workers: Number of processes that train together; 0 for a command.
        text: What the command reads from its standard input.
    """

    def __init__(self, args: list[Any], log: Path, cwd: Path, workers: int = 0, text: str = "") -> None:
        super().__init__(log)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        log.with_suffix(".stdin").write_text(text, encoding="utf-8")
        start_server()
        shared = {"WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": free_port()}
        self.processes = []
        for rank in range(max(workers, 1)):
            variables = {**shared, "RANK": rank, "LOCAL_RANK": rank} if workers else {}
            variables = environment() | {name: str(value) for name, value in variables.items()}
            process = FORKS.Process(target=run_fork, args=([str(x) for x in args], log, cwd, variables, bool(workers)))
            process.start()
            self.processes.append(process)

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        return failed[0] if failed else None if None in codes else 0

    def signal(self, number: int) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                if process.exitcode is None:
                    os.kill(process.pid, number)  # type: ignore[arg-type]
        if number == signal.SIGKILL:
            for process in self.processes:
                process.join()


STARTING = threading.Lock()


def start_server() -> None:
    """Start the process that forks, unless it runs."""
    with STARTING:
        if forkserver._forkserver._forkserver_pid is not None:
            return
        FORKS.set_forkserver_preload(["preload"])
        before = dict(os.environ)
        # Python 3.11 ignores sys.path when it preloads.
        os.environ.update(environment() | {"PYTHONPATH": str(Path(__file__).parent)})
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)


def run_fork(args: list[str], log: Path, cwd: Path, variables: dict[str, str], worker: bool) -> None:
    """What a fork does: take its place in the world, run, and leave at once with an exit code."""
    with log.open("ab", buffering=0) as out, log.with_suffix(".stdin").open("rb", buffering=0) as typed:
        for number, file in ((0, typed), (1, out), (2, out)):
            os.dup2(file.fileno(), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv[:] = args
    assert "axolotl.train" in sys.modules, "nothing was preloaded"
    code = 0
    try:
        if worker:
            runpy.run_module("axolotl.cli.train", run_name="__main__", alter_sys=True)
        else:
            sys.modules["axolotl.cli.main"].main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001  (whatever it is, it is the run's result)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
