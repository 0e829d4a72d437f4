"""``axolotl mote build`` as a user runs it: output, exit status, errors."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from axolotl_mote.cli.build import command

QUESTIONS = ("How is bread baked at home?", "Why do rivers bend so much?", "Who built the first violin?")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that finds everything safe."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a reply in two segments waits 40 ms for an acknowledgment

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked = body["messages"][-1]["content"]
            text = "VERDICT: SAFE" if "safety reviewer" in asked else f"That is {body['seed']} to the question {asked}"
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            data = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data.encode())))
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(tmp_path: Path, url: str) -> Path:
    """A build file over three questions."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    model = {"type": "server", "model": "m", "base_urls": [url], "backoff": 0.01}
    raw = {"output": str(tmp_path / "out"), "questions": [{"path": str(questions)}], "models": {"default": model}}
    path = tmp_path / "build.yml"
    path.write_text(yaml.safe_dump(raw))
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])


def edit(path: Path, **keys: object) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


def test_build_and_build_again(config: Path) -> None:
    first = run(config)
    assert first.exit_code == 0, first.output
    assert "kept: response" in first.output
    assert "6 requests" in first.output
    out = config.parent / "out"
    assert {path.name for path in out.iterdir()} == {
        "journal.jsonl",
        "chains.jsonl",
        "rejected.jsonl",
        "manifest.json",
        "statistics.html",
    }
    second = run(config)
    assert second.exit_code == 0
    assert "0 requests" in second.output


def test_limit_output_and_exclude(config: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text(json.dumps({"prompt": QUESTIONS[0]}) + "\n")
    done = run(config, "--limit", 2, "--exclude", evaluation, "--output", tmp_path / "elsewhere")
    assert done.exit_code == 0, done.output
    assert "excluded" in done.output
    assert len((tmp_path / "elsewhere" / "chains.jsonl").read_text().splitlines()) == 1
    assert "excluded" in (tmp_path / "elsewhere" / "rejected.jsonl").read_text()


def test_shards_and_their_merge(config: Path) -> None:
    for number in (1, 2):
        done = run(config, "--shard", f"{number}/2")
        assert done.exit_code == 0, done.output
        assert f"shard-{number}-of-2" in done.output.replace("\n", "")
    merged = run(config, "--merge")
    assert merged.exit_code == 0, merged.output
    assert "0 requests" in merged.output
    assert len((config.parent / "out" / "chains.jsonl").read_text().splitlines()) == 3
    assert run(config, "--merge", "--restart").exit_code == 0
    for wrong in (["--shard", ""], ["--shard", "3/2"], ["--merge", "--shard", "1/2"]):
        refused = run(config, *wrong)
        assert refused.exit_code == 1
        assert "must be" in refused.output
        assert "Traceback" not in refused.output


def test_a_merge_before_the_shards_are_done_says_what_to_do(config: Path) -> None:
    edit(config, budget={"requests": 1})
    assert {run(config, "--shard", f"{number}/2").exit_code for number in (1, 2)} == {3}
    merged = run(config, "--merge")
    assert merged.exit_code == 3
    assert "Run the shards again, then --merge" in merged.output


def test_a_budget_exits_with_3_until_all_is_done(config: Path) -> None:
    edit(config, budget={"requests": 4})
    first = run(config)
    assert first.exit_code == 3
    assert "Run the same command again" in first.output
    assert run(config).exit_code == 0


def test_servers_that_do_not_answer_exit_with_3(config: Path) -> None:
    model = yaml.safe_load(config.read_text())["models"]["default"]
    edit(config, models={"default": {**model, "base_urls": ["http://127.0.0.1:9/v1"], "retry_for": 0.2}})
    done = run(config)
    assert done.exit_code == 3, done.output
    assert "no server answered for 0.2 s" in done.output
    assert "3 questions are left" in done.output


def test_a_changed_configuration_is_an_error_and_restart_the_way_out(config: Path) -> None:
    run(config)
    edit(config, seed=7)
    refused = run(config)
    assert refused.exit_code == 1
    assert "seed: 42 -> 7" in refused.output
    assert "Traceback" not in refused.output
    restarted = run(config, "--restart")
    assert restarted.exit_code == 0
    assert "journal.1.jsonl" in restarted.output.replace("\n", "")


def test_faults_of_the_build_file_are_shown_without_a_traceback(config: Path) -> None:
    edit(config, chian="full")
    done = run(config)
    assert done.exit_code == 1
    assert "chian" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("package", ["aiohttp", "tenacity"])
def test_a_missing_package_names_the_extra(config: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.delitem(sys.modules, "axolotl_mote.builder.clients.server", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    done = run(config)
    assert done.exit_code == 1
    assert "pip install '.[build]'" in done.output


def test_help_has_an_example() -> None:
    assert "axolotl mote build example_configs/build_local.yml" in run("--help").output


def test_long_sources_show_how_far_they_are_read(config: Path) -> None:
    source = config.parent / "long.jsonl"
    source.write_text(json.dumps({"prompt": QUESTIONS[0]}) + "\n" + '{"prompt": null}\n' * 20_000)
    edit(config, questions=[{"path": str(source)}])
    done = run(config)
    assert done.exit_code == 0, done.output
    assert done.output.index("10,000 rows read") < done.output.index("20,000 rows read")


def test_a_resumed_build_shows_how_far_results_are_collected(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axolotl_mote.cli.build._LINE_EVERY", 1)
    run(config)
    resumed = run(config)
    assert "0 requests" in resumed.output
    assert resumed.output.index("3/3 questions") < resumed.output.index("1 results collected")
    assert resumed.output.index("1 results collected") < resumed.output.index("3 results collected")


@pytest.mark.parametrize(
    "where",
    [
        "axolotl_mote.builder.run.screen_questions",
        "axolotl_mote.builder.run.write_results",
        "axolotl_mote.builder.settings.load_settings",
        "axolotl_mote.cli.build._print_report",
    ],
)
def test_ctrl_c_at_any_moment_exits_with_130(config: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, interrupt)
        done = run(config)
    assert done.exit_code == 130
    assert "Interrupted. Run the same command again to continue." in done.output
    assert run(config).exit_code == 0
