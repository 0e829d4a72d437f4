"""The project's own clients of a server, each in its environment: `mote eval`, inspect_ai and `mote build`.

`EVAL_VENV` and `VENV` name the environments; a test says so and is skipped where its own is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from server_kit import Server, free_port, mote_command
from serving_kit import write_folders

from axolotl_mote.generation.api import generate_chain
from axolotl_mote.generation.loading import load_mote

ROOT = Path(__file__).resolve().parents[2]
FORM = ["analysis", "response"]
LIMITS = {"step_limit": 12}
QUESTIONS = ("How is bread baked at home?", "Say <|response|> twice.", "Why do rivers bend so much?")


def program(variable: str, name: str, default: str) -> str:
    """A program of another environment."""
    found = ROOT / os.environ.get(variable, default) / "bin" / name
    if not found.exists():
        pytest.skip(f"{found} is missing: make eval-env and make venv create it")
    return str(found)


def run(*command: object, cwd: Path, **variables: str) -> str:
    """What a command printed; it must succeed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TRITON_"))} | variables
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = mote_command(folder, "--max-model-len", 4096, "--max-num-seqs", 16)
    one = Server(command, free_port(), tmp_path_factory.mktemp("server") / "log")
    one.start()
    try:
        one.wait()
        yield one
    finally:
        one.end()


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, dict[str, str]]:
    """Texts by step of what transformers generates, by question."""
    model, tokenizer = load_mote(folder / "adapter", folder / "base", dtype=torch.float32)
    dialogues = [[{"role": "user", "content": text}] for text in QUESTIONS]
    chains = generate_chain(
        model, tokenizer, dialogues, FORM, max_new_tokens=64, step_limits=LIMITS["step_limit"], batch_size=3
    )
    return {text: dict(chain.texts) for text, chain in zip(QUESTIONS, chains, strict=True)}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_questions(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return path


def test_evaluation_reads_answer_and_reasoning(server: Server, expected: Any, tmp_path: Path) -> None:
    base = {"server": f"http://127.0.0.1:{server.port}/v1", "model": "mote"}
    raw = {
        "output": "out",
        "systems": [
            {"name": "fixed", **base, "extra_body": {"steps": FORM, **LIMITS}},
            {"name": "adaptive", **base, "extra_body": {"steps": "adaptive", **LIMITS}},
        ],
        "tasks": [{"name": "custom", "path": str(write_questions(tmp_path / "mine.jsonl"))}],
        "max_new_tokens": 64,
    }
    (tmp_path / "eval.yml").write_text(yaml.safe_dump(raw))
    run(program("EVAL_VENV", "axolotl-mote", ".venv-eval"), "eval", "eval.yml", cwd=tmp_path)
    rows = rows_of(tmp_path / "out/results.jsonl")
    assert Counter(row["system"] for row in rows) == {"fixed": len(QUESTIONS), "adaptive": len(QUESTIONS)}
    assert not any(row["error"] for row in rows)
    for row in rows:
        if row["system"] == "fixed":
            chain = expected[row["messages"][-1]["content"]]
            assert row["texts"] == {"reasoning": chain["analysis"], "response": chain["response"]}
            assert row["answer"] == chain["response"]


def test_inspect_ai_sends_steps(server: Server, expected: Any, tmp_path: Path) -> None:
    inspect = program("EVAL_VENV", "inspect", ".venv-eval")
    run(
        inspect, "eval", "axolotl_mote/custom", "-T", f"path={write_questions(tmp_path / 'mine.jsonl')}",
        "--model", "openai-api/served/mote", "--model-base-url", f"http://127.0.0.1:{server.port}/v1",
        "--max-tokens", 64, "--temperature", 0, "--extra-body", json.dumps({"steps": FORM, **LIMITS}),
        "--log-format", "json", "--display", "none",
        cwd=tmp_path, SERVED_API_KEY="none",
    )  # fmt: skip
    (log,) = (tmp_path / "logs").glob("*.json")
    samples = json.loads(log.read_text())["samples"]
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        chain = expected[sample["input"][-1]["content"]]
        reasoning, answer = sample["output"]["choices"][0]["message"]["content"]
        assert (reasoning["reasoning"], answer["text"]) == (chain["analysis"], chain["response"])


def test_a_build_takes_the_server_as_any_other(server: Server, expected: Any, tmp_path: Path) -> None:
    model = {
        "type": "server",
        "model": "mote",
        "base_urls": [f"http://127.0.0.1:{server.port}/v1"],
        "extra_body": {"steps": FORM, **LIMITS},
    }
    raw = {
        "output": "out",
        "questions": [{"path": str(write_questions(tmp_path / "mine.jsonl"))}],
        "models": {"default": model},
    }
    (tmp_path / "build.yml").write_text(yaml.safe_dump(raw))
    run(program("VENV", "axolotl", ".venv"), "mote", "build", "build.yml", cwd=tmp_path)
    calls = [row for row in rows_of(tmp_path / "out/journal.jsonl") if "call" in row]
    assert {call["call"].split("/")[1].split(".")[0] for call in calls} == {"response", "check", "analysis", "guidance"}
    assert all(call["text"] and call["finish"] == "stop" for call in calls)
    assert not any("<|" in call["text"] for call in calls)  # the answer alone, without reasoning and markers
    assert len(rows_of(tmp_path / "out/rejected.jsonl")) == len(QUESTIONS)  # random weights find nothing safe
