"""Builds against a real OpenAI-compatible server: one request at a time, 16 at a time, and with a kill -9 between.

    python tests/bench/server_build.py models/SmolLM2-135M-Instruct            (transformers serve, CPU or GPU)
    python tests/bench/server_build.py MODEL --server "vllm serve MODEL --host 127.0.0.1 --port {port}"

Prints seconds, calls and ratios of times (below 1 is faster). Fails if a call is missing or recorded twice, or if 16
requests at a time take more than a third of the time of one at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import click

from axolotl_mote.builder.run import build
from axolotl_mote.builder.settings import Settings

TOPICS = """
rivers bread violins chess bees glass maps soap wool iron tea clocks salt ferries owls kites paper honey bridges lemons
drums wolves lamps snow cork silk chalk tides corn mirrors foxes rope barns pearls coal frogs tents wheels rice
stamps swans tin ink plums moths canoes hail oats gates ants figs nets elms crabs suns dice hats jam oars peas quilts
rings saws towers
""".split()  # noqa: SIM905
CONCURRENCY = 16


class Server:
    """A server process that can be killed and started again on the same port."""

    def __init__(self, command: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._command = shlex.split(command.format(port=self.port))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, seconds: float = 300) -> None:
        """Until /health answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        self._log.seek(0)
        raise SystemExit(f"the server did not start:\n{self._log.read().decode()[-3000:]}")

    def kill(self) -> None:
        """kill -9 to the whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run(
    folder: Path, name: str, server: Server, model: str, count: int, concurrency: int, tokens: int
) -> dict[str, Any]:
    """One build; returns seconds and counts."""
    questions = folder / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"prompt": f"Tell me one thing about {t}."}) + "\n" for t in TOPICS[:count])
    )
    settings = Settings.model_validate(
        {
            "output": folder / name,
            "questions": [{"path": str(questions)}],
            "deduplicate": None,
            "chain": "response",
            "stages": {
                "response": {"max_new_tokens": tokens, "attempts": 1},
                "check": {"max_new_tokens": max(4, tokens // 4)},
            },
            "models": {
                "default": {
                    "type": "server",
                    "model": model,
                    "base_urls": [f"http://127.0.0.1:{server.port}/v1"],
                    "concurrency": concurrency,
                    "timeout": 300,
                }
            },
        }
    )
    report = build(settings)
    lines = (folder / name / "journal.jsonl").read_text().splitlines()[1:]
    calls = [json.loads(line) for line in lines]
    if report.counts["pending"] or len({call["call"] for call in calls}) != len(calls):
        raise SystemExit(f"{name}: {report.counts['pending']} questions lost, or calls recorded twice")
    generated = sum(call["completion_tokens"] for call in calls)
    print(
        f"{name}: {count} questions, {report.requests} requests, {len(calls)} calls recorded, {generated} tokens, "
        f"{report.seconds:.1f} s, {generated / report.seconds:.1f} tokens/s, pending {report.counts['pending']}",
        flush=True,
    )
    return {"seconds": report.seconds, "calls": len(calls), "rate": generated / report.seconds}


def run_with_kill(folder: Path, name: str, server: Server, *arguments: Any) -> dict[str, Any]:
    """A build in which the server is killed, after as many recorded calls as the last argument says, and restarted."""
    *others, calls = arguments
    journal = folder / name / "journal.jsonl"

    def disturb() -> None:
        while not journal.exists() or journal.read_text().count("\n") < calls:
            time.sleep(0.05)
        server.kill()
        print(f"server killed with {journal.read_text().count(chr(10)) - 1} calls recorded", flush=True)
        server.start()

    helper = threading.Thread(target=disturb)
    helper.start()
    result = run(folder, name, server, *others)
    helper.join()
    return result


@click.command()
@click.argument("model")
@click.option("--server", "command", help="Command line with {port}; transformers serve when left out.")
@click.option("--count", default=64, show_default=True, help="Questions.")
@click.option("--tokens", default=32, show_default=True, help="Token limit of an answer; a check gets a quarter.")
def main(model: str, command: str | None, count: int, tokens: int) -> None:
    """Measure builds against a real server."""
    transformers = Path(sys.executable).with_name("transformers")
    default = f"{transformers} serve {model} --continuous-batching --host 127.0.0.1 --port {{port}}"
    server = Server(command or default)
    try:
        server.wait()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run(folder, "warm-up", server, model, 2, 2, tokens)
            many = run(folder, "16 at a time", server, model, count, CONCURRENCY, tokens)

            half = many["calls"] // 2
            killed = run_with_kill(
                folder, "16 at a time, server killed", server, model, count, CONCURRENCY, tokens, half
            )
            single = run(folder, "one at a time", server, model, count, 1, tokens)
    finally:
        server.kill()
    print("time against one at a time (below 1 is faster)")
    print(f"  16 at a time: {many['seconds'] / single['seconds']:.2f}, per token {single['rate'] / many['rate']:.2f}")
    print(f"  16 at a time, server killed and restarted: {killed['seconds'] / single['seconds']:.2f}")
    if many["seconds"] > single["seconds"] / 3:
        raise SystemExit("16 at a time must take at most a third of the time of one at a time")


if __name__ == "__main__":
    main()
