"""Servers, each in a session of its own so that all of its processes can be ended; and what a client reads."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import openai

SIZES = ["--max-model-len", "512", "--max-num-seqs", "8", "--block-size", "32", "--dtype", "float32", "--enforce-eager"]

_TEST_ONLY = ("TRITON_INTERPRET", "VLLM_ENABLE_V1_MULTIPROCESSING", "PYTHONDONTWRITEBYTECODE")
"""Variables of the tests that a server must not see; without the last, three processes compile all they import."""


def free_port(wanted: int = 0) -> int:
    """The wanted port if it is free, else any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return free_port()
        return int(probe.getsockname()[1])


def mote_command(folder: Path, *flags: object) -> list[object]:
    """`axolotl-mote serve` on an exported folder."""
    return [sys.executable, "-m", "axolotl_mote.cli", "serve", folder, *SIZES, *flags]


class Server:
    """A server on the V1 runner.

    Args:
        command: What to run, without host and port.
        port: Where it listens.
        log: Its output, shown when it does not start.
        **environment: Further variables.
    """

    def __init__(self, command: Sequence[object], port: int, log: Path, **environment: str) -> None:
        self.port, self.log = port, log
        self._command = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
        own = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_LOGGING_LEVEL": "INFO"} | environment
        self._environment = {k: v for k, v in os.environ.items() if k not in _TEST_ONLY} | own
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=0)

    def start(self) -> None:
        """Start it, and return at once."""
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=out, stderr=out, start_new_session=True
            )

    def healthy(self) -> bool:
        """Whether it says that it serves."""
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except (URLError, OSError):
            return False

    def wait(self) -> None:
        """Until it serves."""
        wait_until(lambda: self.healthy() or self.process.poll() is not None, seconds=900)
        assert self.process.poll() is None, self.log.read_text()[-6000:]

    def refusal(self) -> tuple[int, str]:
        """Exit status and output of a server that must not start serving."""
        wait_until(lambda: self.healthy() or self.process.poll() is not None, seconds=900)
        assert self.process.poll() is not None, "it serves"
        return self.process.returncode, self.log.read_text()

    def end(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to all of its processes, and wait for them."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        self.process.wait(120)
        wait_until(lambda: not self.alive(), seconds=60)

    def alive(self) -> list[str]:
        """What still runs in its session."""
        command = ["ps", "-o", "stat=,pid=,args=", "-s", str(self.process.pid)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return [line for line in found.stdout.splitlines() if not line.startswith("Z")]

    def metric(self, name: str) -> float:
        """The sum of a metric of vLLM's."""
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as page:
            values = re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", page.read().decode(), re.MULTILINE)
        assert values, name
        return sum(map(float, values))


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    """Until something is so; it must be within some seconds."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@dataclass
class Choice:
    """One choice of an answer, in one piece or put together from a stream."""

    reasoning: str = ""
    content: str = ""
    finish: str | None = None
    stop: Any = None
    logprobs: tuple[Any, ...] = ()

    def add(self, choice: Any, part: Any) -> None:
        """Take what a message or a delta holds."""
        self.reasoning += getattr(part, "reasoning", None) or ""
        self.content += part.content or ""
        if choice.logprobs:
            self.logprobs += tuple((one.token, round(one.logprob, 3)) for one in choice.logprobs.content)
        if choice.finish_reason:
            self.finish, self.stop = choice.finish_reason, choice.stop_reason


def read(answer: Any) -> tuple[list[dict[str, Any]], Any]:
    """Choices of an answer or a stream, and the usage."""
    pieces: Iterable[Any] = [answer] if hasattr(answer, "usage") else answer
    choices: dict[int, Choice] = {}
    usage = None
    for piece in pieces:
        usage = piece.usage or usage
        for choice in piece.choices:
            part = choice.delta if hasattr(choice, "delta") else choice.message
            choices.setdefault(choice.index, Choice()).add(choice, part)
    return [asdict(choices[index]) for index in sorted(choices)], usage
