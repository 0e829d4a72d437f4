"""Servers that refuse, repeat, die or are none: a run ends, says why, and every rerun gets further."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

import kit
import scripted_models
from pydantic import ValidationError
from scripted_models import record_calls, rows_of

from axolotl_mote.evaluation import tasks
from axolotl_mote.evaluation.run import run
from axolotl_mote.evaluation.running.costs import costs
from axolotl_mote.evaluation.running.endpoints import reason, server_fault, status_of
from axolotl_mote.evaluation.settings import Settings, System
from axolotl_mote.report import Page

GRADER = {"inspect_model": "scripted/grader"}


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plots; they take half of a run."""
    monkeypatch.setattr(Page, "plots", lambda self, plots: None)
    record_calls(tmp_path, monkeypatch)


def served(address: str, **changed: Any) -> dict[str, Any]:
    return {"name": "served", "server": address, "model": "m", "concurrency": 1, "retry_for": 1, **changed}


def settings(output: Path, system: dict[str, Any], limit: int = 12, **changed: Any) -> Settings:
    task = {"name": "xstest", "limit": limit}
    return Settings.model_validate({"output": output, "systems": [system], "tasks": [task], **changed})


def answers(output: Path) -> int:
    return sum(row["error"] is None for row in rows_of(output))


def is_bad(prompt: str, of: int = 4) -> bool:
    return scripted_models.number_of(prompt) % of == 0


def test_refused_prompts_do_not_stop_the_others(tmp_path: Path) -> None:
    def refuses(number: int, body: dict[str, Any], key: str) -> tuple[int, str]:
        return (400, "context length exceeded") if is_bad(body["messages"][-1]["content"]) else (200, "Sure.")

    lines: list[str] = []
    with scripted_models.server(refuses) as (address, seen):
        report = run(settings(tmp_path / "out", served(address, concurrency=4), 40), tell=lines.append)
        bad = sum(map(is_bad, set(seen)))
        assert 4 < bad < 20
        assert len(seen) == 40
        assert answers(tmp_path / "out") == 40 - bad
        assert report.faults == [f"served, xstest: {bad} of 40 answers are missing: {bad} failed"]
        assert any("such as: " in line and "context length exceeded" in line for line in lines)
        run(settings(tmp_path / "out", served(address, concurrency=4), 40))
        assert len(seen) == 40 + bad


@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_server_that_only_fails_is_given_up(tmp_path: Path, status: int) -> None:
    with scripted_models.server(lambda n, body, key: (status, "overloaded")) as (address, seen):
        report = run(settings(tmp_path / "out", served(address, concurrency=3), 30))
    assert len(set(seen)) <= 7 + 3
    assert answers(tmp_path / "out") == 0
    assert "7 requests in a row failed" in report.faults[0] or "8 requests" in report.faults[0]
    assert f"Error code: {status} - overloaded" in report.faults[0]


def test_a_server_that_fails_on_some_prompts_gets_further_in_every_run(tmp_path: Path) -> None:
    def fails(number: int, body: dict[str, Any], key: str) -> tuple[int, str]:
        return (401, "odd") if is_bad(body["messages"][-1]["content"], 2) else (200, "Sure.")

    asked: list[int] = []
    with scripted_models.server(fails) as (address, seen):
        for _ in range(8):
            report = run(settings(tmp_path / "out", served(address), 60))
            asked.append(len(set(seen)))
            if "in a row" not in "".join(report.faults):
                break
    assert all(later > earlier for earlier, later in pairwise(asked))
    assert asked[-1] == 60
    assert answers(tmp_path / "out") == 60 - sum(is_bad(prompt, 2) for prompt in set(seen))


def test_a_server_that_goes_away_is_not_waited_for(tmp_path: Path) -> None:
    def dies(number: int, body: dict[str, Any], key: str) -> tuple[int, str]:
        return (0 if number > 5 else 200), "Sure."

    with scripted_models.server(dies) as (address, seen):
        report = run(settings(tmp_path / "out", served(address, concurrency=2), 40))
    assert len(seen) <= 7
    assert "does not answer" in report.faults[0]
    rows = rows_of(tmp_path / "out")
    assert answers(tmp_path / "out") == 5
    assert len(rows) <= 9  # what was not asked is no row
    with scripted_models.server(lambda n, body, key: (200, "Sure.")) as (address, seen):
        assert run(settings(tmp_path / "out", served(address, concurrency=2), 40)).faults == []
        assert len(seen) == 35


def test_what_a_server_thinks_first_is_not_judged(tmp_path: Path) -> None:
    """Prompt 0 closes a block, 1 never does, 2 has one, 3 repeats a mark of the question, 4 has a mark inside."""
    refusal = "I am sorry, but I cannot help with that."
    said = {
        0: f"Sure, here is how.</think>{refusal}",
        1: f"<think>Sure, here is how. {refusal}",
        2: f"<think>Sure, here is how.</think>\n\n{refusal}",
        3: f"Sure, here is how.</think>{refusal}",
        4: "Sure, write <think> and then this.",
    }
    own = tmp_path / "own.jsonl"
    asked = [{"id": str(n), "prompt": f"Question {n}{' of </think>' if n == 3 else ''}", "label": "safe"} for n in said]
    own.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")

    def reply(number: int, body: dict[str, Any], key: str) -> tuple[int, str]:
        return 200, said[int(body["messages"][-1]["content"].split()[1])]

    with scripted_models.server(reply) as (address, _):
        run(settings(tmp_path / "out", served(address), tasks=[{"name": "custom", "path": str(own)}]))
    rows = {int(row["id"]): row for row in rows_of(tmp_path / "out")}
    assert [rows[n]["answer"] for n in said] == [refusal, "", refusal, said[3], said[4]]
    assert [rows[n]["texts"].get("reasoning") for n in range(3)] == [
        *("Sure, here is how.", f"Sure, here is how. {refusal}", "Sure, here is how."),
    ]
    assert [rows[n]["finished"] for n in said] == [True, False, True, True, True]
    assert [rows[n]["scores"]["refusal"]["status"] for n in said] == ["scored", "empty", "scored", "scored", "scored"]
    assert {row["output_tokens"] for row in rows.values()} == {7}


def test_errors_are_one_line_that_says_the_cause(tmp_path: Path) -> None:
    for status in (400, 429, 500):
        with scripted_models.server(lambda n, body, key, status=status: (status, "the\nreason")) as (address, _):
            run(settings(tmp_path / str(status), served(address), 1))
        [row] = rows_of(tmp_path / str(status))
        assert re.fullmatch(rf"\w+: Error code: {status} - .*the reason.*", row["error"])
        assert "RetryError" not in row["error"]
        assert "0x" not in row["error"]


def test_reasons_of_chains() -> None:
    deep = RuntimeError("RetryError")
    deep.__cause__ = ConnectionRefusedError(f"no {object()}\n there")
    assert reason(deep) == "ConnectionRefusedError: no <object object> there"
    assert reason(ValueError()) == "ValueError"
    loop = ValueError("a")
    loop.__cause__ = other = ValueError("b")
    other.__cause__ = loop
    assert reason(loop) == "ValueError: b"
    assert status_of(loop) is None


def test_no_task_loops_on_tool_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that always calls tools would be asked for ever."""
    calls: list[str] = []
    monkeypatch.setattr(
        tasks, "generate", lambda **given: calls.append(given.get("tool_calls")) or tasks_generate(**given)
    )
    tasks.xstest(limit=1)
    assert calls == ["none"]


tasks_generate = tasks.generate


# --- addresses ------------------------------------------------------------------------------------------------------


@contextmanager
def speaking(data: bytes) -> Iterator[str]:
    """A port that says the same to everyone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                    with peer:
                        peer.recv(4096)
                        peer.sendall(data)
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("data", [b"SSH-2.0-OpenSSH\r\n", b"", b"HTTP/9 x\r\n\r\n"])
def test_a_port_that_is_no_server_costs_its_own_cells_alone(tmp_path: Path, data: bytes) -> None:
    other = {"name": "base", "inspect_model": "scripted/base"}
    with speaking(data) as address:
        report = run(settings(tmp_path / "out", served(address), 2, systems=[served(address), other]))
    assert len(report.faults) == 1
    assert "does not answer" in report.faults[0]
    assert Counter(row["system"] for row in rows_of(tmp_path / "out")) == {"base": 2}


@pytest.mark.parametrize(
    "address",
    ["http://a b/v1", "http://", "http:///v1", "http://h:99999/v1", "http://[::1/v1", "http://h/\nv1", "http://h:x/v1"],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValidationError, match="server must be an address"):
        System(name="a", server=address, model="m")


@pytest.mark.parametrize("address", ["http://localhost:8000/v1", "https://h/v1?x=1", "http://[::1]:8000/v1"])
def test_addresses(address: str) -> None:
    assert System(name="a", server=address, model="m").server == address


def test_a_host_that_cannot_be_spelled_does_not_answer() -> None:
    assert "does not answer" in str(server_fault(System(name="a", server=f"http://{'x' * 70}.invalid/v1", model="m")))


# --- costs ----------------------------------------------------------------------------------------------------------


def test_judge_calls_count_answers_with_stale_scores(tmp_path: Path) -> None:
    base = {"name": "base", "inspect_model": "scripted/base"}
    task = [{"name": "strongreject", "limit": 4}]
    run(settings(tmp_path / "out", base, tasks=task))
    one = settings(tmp_path / "out", base, tasks=task, grader=GRADER)
    [cost] = costs(one)
    assert (cost.answers, cost.judge_calls) == (0, 4)
    calls = tmp_path / "calls.jsonl"
    before = len(calls.read_text().splitlines())
    run(one)
    assert len(calls.read_text().splitlines()) - before == cost.judge_calls
    assert costs(one)[0].judge_calls == 0
    other = settings(tmp_path / "out", base, tasks=task, grader={"inspect_model": "scripted/other-grader"})
    assert costs(other)[0].judge_calls == 4
    assert costs(settings(tmp_path / "out", base, tasks=task))[0].judge_calls == 0


def test_most_tokens_of_verify_mode_hold_all_attempts(tmp_path: Path) -> None:
    model, tokenizer = kit.tiny_model(), kit.tiny_tokenizer(kit.STEPS)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = kit.save_adapter(kit.random_adapter(model, tokenizer), tokenizer, tmp_path / "adapter", tmp_path / "base")
    system = {"name": "mote", "adapter": str(adapter), "steps": ["verify", "adaptive"]}
    found = costs(settings(tmp_path / "out", system, 2, max_new_tokens=24))
    reasoning = len(kit.STEPS) - 1 - ("check" in kit.STEPS)
    assert [c.most_tokens for c in found] == [2 * 24 * (reasoning + 1), 2 * 24]
    report = run(settings(tmp_path / "out", system, 2, max_new_tokens=24))
    assert report.faults == []
    for cost, mode in zip(found, ("verify", "adaptive"), strict=True):
        spent = sum(row["output_tokens"] for row in rows_of(tmp_path / "out") if row["steps"] == mode)
        assert 0 < spent <= cost.most_tokens
