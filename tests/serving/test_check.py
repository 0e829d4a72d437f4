"""`serve --check`: what it judges, on answers that transformers itself gave, right and spoilt."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from serving_kit import write_folders

from axolotl_mote.cli import serve
from axolotl_mote.generation.api import generate_chain
from axolotl_mote.generation.loading import load_mote
from axolotl_mote.serving import check
from axolotl_mote.serving.check import MAX_TOKENS, STEP_LIMIT, Said, check_table, compare, probe_questions

SERVER = """
import sys, subprocess, http.server
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("check"))


@pytest.fixture(scope="module")
def said(folder: Path) -> list[Said]:
    """What a faultless server says to four of the questions."""
    model, tokenizer = load_mote(folder / "adapter", folder / "base", dtype=torch.float32)
    codec, found = check.served_codec(folder), []
    numbers = (0, 12, 16, 31)
    for mode in check.probe_modes(codec):
        questions = [probe_questions()[number] for number in numbers]
        chains = generate_chain(model, tokenizer, questions, mode, MAX_TOKENS, step_limits=STEP_LIMIT)
        for number, question, chain in zip(numbers, questions, chains, strict=True):
            prompt, tokens = codec.encode_question(question), list(chain.token_ids)
            with torch.no_grad():
                table = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
            logprobs = [float(table[len(prompt) - 1 + n, token]) for n, token in enumerate(tokens)]
            found.append(Said(number, mode, prompt, tokens, logprobs, len(prompt)))
    return found


def test_32_questions_in_adaptive_and_all_fixed_modes(folder):
    questions = probe_questions()
    assert len({question[-1]["content"] for question in questions}) == len(questions) == 32
    assert check.probe_modes(check.served_codec(folder)) == [
        "adaptive",
        ["response"],
        ["analysis", "response"],
        ["analysis", "guidance", "response"],
    ]


def test_a_server_that_routes_rightly_has_no_faults(folder, said):
    report = compare(folder, said, "float32")
    assert report.faults == []
    assert report.chains == len(said) == 16
    assert report.right.max() < 1e-4
    assert report.late.mean() > 100 * report.right.mean()
    assert len(report.right) == sum(len(one.tokens) for one in said)
    assert check_table(report).row_count == 3


@pytest.mark.parametrize(
    ("spoil", "dtype", "message"),
    [
        (lambda one: replace(one, logprobs=[p - 0.01 for p in one.logprobs]), "float32", "by up to 0.01, more than"),
        (lambda one: replace(one, logprobs=[p - 0.5 for p in one.logprobs]), None, "of what a late route does"),
        (lambda one: replace(one, tokens=[*one.tokens[:-2], 40, 41]), "float32", "16 chains are not those of"),
        (lambda one: replace(one, tokens=one.tokens[:-1], logprobs=one.logprobs[:-1]), "float32", "16 chains"),
        (lambda one: replace(one, seen=len(one.prompt) + 1), None, "16 prompts are not those of training"),
    ],
)
def test_a_server_that_is_wrong_is_told_of(folder, said, spoil, dtype, message):
    faults = compare(folder, [spoil(one) for one in said], dtype).faults
    assert any(message in fault for fault in faults), faults


def test_rounding_of_half_precision_is_no_fault(folder, said):
    rounded = [replace(one, logprobs=torch.tensor(one.logprobs).bfloat16().tolist()) for one in said]
    assert compare(folder, rounded).faults == []
    assert compare(folder, rounded, "float32").faults != []


def is_alive(process: int) -> bool:
    """Whether a process runs, zombies not counted."""
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


def ends_soon(process: int) -> bool:
    """Whether a process that was sent a signal is gone within ten seconds."""
    deadline = time.monotonic() + 10
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not is_alive(process)


def test_a_server_ends_with_the_block_and_all_its_children(tmp_path):
    port, log = check.free_port(), tmp_path / "log"
    with check.running_server([sys.executable, "-c", SERVER, str(port)], port, log) as url:
        assert url == f"http://127.0.0.1:{port}/v1"
        child = int(log.read_text().split()[1])
        assert is_alive(child)
    assert ends_soon(child)


def test_a_server_that_does_not_start_is_quoted(tmp_path):
    command = [sys.executable, "-c", "print('no memory left'); raise SystemExit(3)"]
    with (
        pytest.raises(RuntimeError, match=r"ended with status 3 before it answered:\nno memory left"),
        check.running_server(command, check.free_port(), tmp_path / "log"),
    ):
        pass


def test_sigterm_ends_the_server_too(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from axolotl_mote.serving.check import running_server\n"
        f"with running_server([sys.executable, '-c', {SERVER!r}, sys.argv[1]], int(sys.argv[1]), Path(sys.argv[2])):\n"
        "    print('ready', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(check.free_port()), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as checker:
        assert checker.stdout
        assert checker.stdout.readline() == "ready\n"
        child = int((tmp_path / "log").read_text().split()[1])
        os.kill(checker.pid, signal.SIGTERM)
        assert checker.wait(60) == 128 + signal.SIGTERM
    assert ends_soon(child)


@pytest.mark.parametrize(("spoilt", "status"), [(False, 0), (True, 1)])
def test_the_command_says_what_it_found(monkeypatch, folder, said, spoilt, status):
    started: list[Any] = []
    answers = [replace(one, seen=1) for one in said] if spoilt else said

    class Running:
        def __init__(self, command: list[str], port: int, log: Path, host: str) -> None:
            started.append((command, port))

        def __enter__(self) -> str:
            return "http://127.0.0.1:1/v1"

        def __exit__(self, *_: object) -> None:
            started.append("stopped")

    monkeypatch.setattr(check, "running_server", Running)
    monkeypatch.setattr(check, "ask_server", lambda client, name, place: answers)
    monkeypatch.setattr("axolotl_mote.serving.compat.check_version", lambda: None)
    result = CliRunner().invoke(serve.command, ["--check", str(folder), "--dtype=float32", "--port", "4567"])
    assert result.exit_code == status, result.output
    (command, port), stopped = started
    assert (port, stopped, command.count("--port")) == (4567, "stopped", 1)
    assert ("wrong: 16 prompts" in result.output) == spoilt
    assert "16 of 16 chains equal" in " ".join(result.output.split())


def test_a_port_on_which_another_server_listens_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-c", "raise SystemExit('started')"]
        with (
            pytest.raises(RuntimeError, match=f"^--port must be free; got {port}, where something listens"),
            check.running_server(command, port, tmp_path / "log"),
        ):
            pass
    assert not (tmp_path / "log").exists()


def test_another_address_and_a_key_are_used(monkeypatch, folder, said, tmp_path):
    started: list[Any] = []

    class Running:
        def __init__(self, command: list[str], port: int, log: Path, host: str) -> None:
            started.append(host)

        def __enter__(self) -> str:
            return "http://127.0.0.1:1/v1"

        def __exit__(self, *_: object) -> None:
            pass

    def ask(client: Any, name: str, place: Path) -> Any:
        started.append(client.api_key)
        return said

    monkeypatch.setattr(check, "running_server", Running)
    monkeypatch.setattr(check, "ask_server", ask)
    monkeypatch.setattr("axolotl_mote.serving.compat.check_version", lambda: None)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for flags in (["--host", "127.0.0.2", "--api-key=k"], ["--host=0.0.0.0"], []):
        assert CliRunner().invoke(serve.command, ["--check", str(folder), *flags]).exit_code == 0
    assert started == ["127.0.0.2", "k", "127.0.0.1", "none", "127.0.0.1", "none"]
    for flag in ("--uds", "--ssl-keyfile"):
        refused = CliRunner().invoke(serve.command, ["--check", str(folder), flag, "x"])
        assert refused.exit_code == 1
        assert f"--check must reach the server over HTTP; got {flag}" in refused.output
    (tmp_path / "flags.yml").write_text("host: 127.0.0.2")
    refused = CliRunner().invoke(serve.command, ["--check", str(folder), "--config", str(tmp_path / "flags.yml")])
    assert "--check must be given the flags themselves; got --config" in refused.output


def test_a_server_at_another_address_is_found(tmp_path):
    port = check.free_port()
    command = [sys.executable, "-c", SERVER.replace("127.0.0.1", "127.0.0.2"), str(port)]
    with check.running_server(command, port, tmp_path / "log", "127.0.0.2") as url:
        assert url == f"http://127.0.0.2:{port}/v1"
