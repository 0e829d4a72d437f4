"""Whole builds: killed, interrupted, resumed, restarted, with several models."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builder_kit import Reply, ScriptedServer, chat_reply, read_rows, stage_of, write_rows
from datasets import load_dataset
from kill_driver import StandIn

from axolotl_mote.builder.loop.journal import JournalError
from axolotl_mote.builder.run import build
from axolotl_mote.builder.settings import Budget, QuestionSource, Settings
from axolotl_mote.chain.rows import check_rows
from axolotl_mote.chain.steps import DEFAULT_STEPS
from axolotl_mote.files import read_jsonl

Make = Callable[..., Settings]
Serve = Callable[..., ScriptedServer]
RESULTS = ("chains.jsonl", "rejected.jsonl", "manifest.json", "statistics.html")


def answer(body: dict[str, Any], number: int) -> Reply:
    """Depends on the request alone, as a deterministic server would; unsafe for about half of the first answers."""
    text = body["messages"][-1]["content"]
    seed = int(body["seed"])
    if stage_of(body) == "check":
        return chat_reply("VERDICT: SAFE" if seed % 2 else "VERDICT: UNSAFE")
    return chat_reply(f"{seed} says {text[:30]} and {seed * 31}")


@pytest.mark.parametrize("kind", ["local", "server"])
def test_kill_9_at_20_random_moments_loses_nothing_and_repeats_nothing(tmp_path: Path, kind: str) -> None:
    driver = Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), "20", kind], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["kills"], result["lost"]) == (20, 0)
    assert result["same"]
    assert result["twice"] == 0
    assert result["kept"] > 5


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """A shell without job control starts its background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_keeps_what_was_done(make_settings: Make, serve: Serve, tmp_path: Path) -> None:
    def interrupt(body: dict[str, Any], number: int) -> Reply:
        if number <= 20:
            time.sleep(0.02)  # so that requests are in flight
        if number == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return answer(body, number)

    server = serve(interrupt)
    settings = make_settings(server.url, count=20, server={"concurrency": 2})
    report = build(settings)
    assert report.stopped == "interrupted"
    assert 0 < report.counts["pending"] < 20
    assert (settings.output / "manifest.json").exists()
    again = build(settings)
    assert again.counts["pending"] == 0
    whole = settings.model_copy(update={"output": tmp_path / "whole"})
    build(whole)
    assert (settings.output / "chains.jsonl").read_bytes() == (whole.output / "chains.jsonl").read_bytes()


def test_a_changed_configuration_is_refused_until_restart(make_settings: Make, serve: Serve) -> None:
    server = serve(answer)
    build(make_settings(server.url))
    changed = make_settings(server.url, seed=7)
    with pytest.raises(JournalError, match="seed: 42 -> 7"):
        build(changed)
    report = build(changed, restart=True)
    assert str(changed.output / "journal.1.jsonl") in report.set_aside
    assert report.requests > 0


def test_more_questions_go_on_with_the_same_journal(make_settings: Make, serve: Serve) -> None:
    server = serve(answer)
    build(make_settings(server.url, count=4))
    before = len(server.bodies)
    report = build(make_settings(server.url, count=8))
    assert report.counts["questions"] == 8
    assert sum(f'"{b["seed"]}"' == f'"{server.bodies[0]["seed"]}"' for b in server.bodies) == 1
    assert len(server.bodies) > before


def test_near_duplicate_answers_are_dropped_in_the_order_of_the_questions(make_settings: Make, serve: Serve) -> None:
    same = "It depends on the weather, on the season, and on how much time you have."
    server = serve(lambda body, number: chat_reply(same))
    settings = make_settings(server.url, chain="response", check=False)
    report = build(settings)
    assert report.counts["reasons"] == {"near_duplicate_answer": 3}
    (kept,) = read_rows(settings.output / "chains.jsonl")
    assert kept["messages"][0]["content"] == read_rows(Path(settings.questions[0].path))[0]["prompt"]
    rejected = read_rows(settings.output / "rejected.jsonl")
    assert [row["reason"] for row in rejected] == ["near_duplicate_answer"] * 3
    assert build(settings.model_copy(update={"deduplicate": None})).counts["kept"] == 4  # no new texts needed


def test_the_manifest_tells_where_the_data_comes_from(
    make_settings: Make, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    settings = make_settings(serve(answer).url, server={"api_key_env": "SECRET_KEY"})
    report = build(settings)
    text = (settings.output / "manifest.json").read_text()
    manifest = json.loads(text)
    assert "hunter2" not in text
    assert manifest["counts"] == report.counts
    assert manifest["finished"]
    assert set(manifest["prompts"]) == {"response", "analysis", "guidance", "check"}
    assert manifest["answered_by"] == {"scripted": sum(manifest["calls"].values())}
    assert len(manifest["inputs"][settings.questions[0].path]) == 64
    assert {"axolotl_mote", "python", "aiohttp"} <= set(manifest["versions"])
    assert manifest["identity"]["seed"] == 42


def test_the_manifest_tells_parts_of_one_data_set_apart(
    make_settings: Make, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    settings = make_settings(serve(answer).url)
    sources = []
    for part in ("a", "b"):
        (tmp_path / "set" / part).mkdir(parents=True)
        write_rows(tmp_path / "set" / part / "train.jsonl", [{"prompt": f"What is {part} good for?"}] * 2)
        sources.append(QuestionSource(path=str(tmp_path / "set"), data_dir=part))
    build(settings.model_copy(update={"questions": sources}))
    labels = [f"{tmp_path / 'set'}/a", f"{tmp_path / 'set'}/b"]
    assert list(json.loads((settings.output / "manifest.json").read_text())["inputs"]) == labels
    assert [row["source"] for row in read_rows(settings.output / "rejected.jsonl") if row.get("source")] == labels


def test_a_server_that_dies_and_comes_back_loses_nothing(make_settings: Make, serve: Serve, tmp_path: Path) -> None:
    first = serve(answer)
    port = int(first.url.split(":")[2].split("/")[0])
    settings = make_settings(first.url, count=24, server={"concurrency": 8, "retry_for": 20})

    def restart() -> None:
        while len(first.bodies) < 20:
            time.sleep(0.005)
        first.close()
        time.sleep(0.2)
        running.append(ScriptedServer(answer, port))

    running: list[ScriptedServer] = []
    thread = threading.Thread(target=restart)
    thread.start()
    report = build(settings)
    thread.join()
    assert report.counts["pending"] == 0
    assert running[0].bodies
    running[0].close()
    calls = [json.loads(line)["call"] for line in (settings.output / "journal.jsonl").read_text().splitlines()[1:]]
    assert len(calls) == len(set(calls))


def test_a_local_writer_and_a_server_as_judge(
    make_settings: Make, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("axolotl_mote.builder.clients.local.LocalClient", StandIn)
    guard = serve(lambda body, number: chat_reply("safe"))
    models = {
        "default": {"type": "local", "path": "stand-in", "batch_size": 2},
        "guard": {"type": "server", "model": "g", "base_urls": [guard.url]},
    }
    settings = make_settings(count=10, models=models, stages={"check": {"model": "guard", "style": "guard"}})
    report = build(settings)
    assert (report.counts["pending"], report.counts["verdicts"]) == (0, {"safe": len(guard.bodies)})
    assert build(settings).requests == 0


def test_the_trainer_accepts_the_rows(make_settings: Make, serve: Serve, tmp_path: Path) -> None:
    settings = make_settings(serve(answer).url, count=12)
    odd = [
        {"prompt": "Where do owls sleep?", "id": 1},
        {"prompt": "Why is tea so bitter?", "id": 1},
        {
            "chosen": "\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: \u2028Three <|analysis|>?\n\nAssistant: x",
            "extra": [1],
        },
    ]
    more = QuestionSource(path=str(write_rows(tmp_path / "odd.jsonl", odd)))
    settings = settings.model_copy(update={"questions": [*settings.questions, more]})
    assert build(settings).counts["questions"] == 15
    path = settings.output / "chains.jsonl"
    check_rows(read_jsonl(path), DEFAULT_STEPS, str(path))
    rows = load_dataset("json", data_files=str(path), split="train")
    assert {"messages", "analysis", "guidance", "response", "check", "extra"} <= set(rows.column_names)
    assert len(set(rows["id"])) == len(rows)


# --- what is on disk never shrinks ----------------------------------------------------------------------------------


def stop_by_a_dead_server(settings: Settings) -> None:
    dead = settings.models["default"].model_copy(update={"base_urls": ["http://127.0.0.1:9/v1"], "retry_for": 0.2})
    report = build(settings.model_copy(update={"models": {"default": dead}}))
    assert "no server answered" in (report.stopped or "")


def stop_by_the_budget(settings: Settings) -> None:
    report = build(settings.model_copy(update={"budget": Budget(requests=1)}))
    assert "budget.requests reached" in (report.stopped or "")


def stop_by_an_error(settings: Settings) -> None:
    broken = settings.models["default"].model_copy(update={"api_key_env": "NO_SUCH_KEY"})
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        build(settings.model_copy(update={"models": {"default": broken}}))


def stop_by_ctrl_c(settings: Settings) -> None:
    async def interrupt(self: object, call: object, stage: object) -> None:
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("axolotl_mote.builder.clients.server.ServerClient.complete", interrupt)
        assert build(settings).stopped == "interrupted"


@pytest.mark.usefixtures("ctrl_c_interrupts", "real_page")
@pytest.mark.parametrize("stop", [stop_by_a_dead_server, stop_by_the_budget, stop_by_an_error, stop_by_ctrl_c])
def test_a_run_that_stops_early_keeps_every_finished_chain(
    make_settings: Make, serve: Serve, tmp_path: Path, stop: Callable[[Settings], None]
) -> None:
    """New questions come first, so that the run stops before it reaches the finished ones."""
    settings = make_settings(serve(answer).url, count=12, server={"concurrency": 2})
    build(settings)
    finished = read_rows(settings.output / "chains.jsonl")
    rejected = read_rows(settings.output / "rejected.jsonl")
    assert len(finished) + len(rejected) == 12
    new = write_rows(tmp_path / "new.jsonl", [{"prompt": f"What is new about {i} * {i * 77}?"} for i in range(9)])
    more = settings.model_copy(update={"questions": [QuestionSource(path=str(new)), *settings.questions]})
    stop(more)
    kept = read_rows(settings.output / "chains.jsonl")
    assert [row for row in kept if row in finished] == finished
    assert [row for row in read_rows(settings.output / "rejected.jsonl") if row in rejected] == rejected
    assert f"{len(kept)} chains" in (settings.output / "statistics.html").read_text()
    counts = json.loads((settings.output / "manifest.json").read_text())["counts"]
    assert (counts["questions"], counts["kept"]) == (21, len(kept))
    assert counts["pending"] == 21 - len(kept) - counts["rejected"] > 0


@pytest.mark.usefixtures("real_page")
@pytest.mark.parametrize("lost", [False, True], ids=["restart", "journal lost"])
def test_a_new_journal_puts_the_older_results_aside(make_settings: Make, serve: Serve, lost: bool) -> None:
    settings = make_settings(serve(answer).url)
    build(settings)
    older = {name: (settings.output / name).read_bytes() for name in RESULTS}
    assert older["chains.jsonl"]
    if lost:
        (settings.output / "journal.jsonl").unlink()
    dead = settings.models["default"].model_copy(update={"base_urls": ["http://127.0.0.1:9/v1"], "retry_for": 0.2})
    report = build(settings.model_copy(update={"models": {"default": dead}}), restart=not lost)
    aside = {name: (settings.output / name.replace(".", ".1.")) for name in RESULTS}
    assert {name: path.read_bytes() for name, path in aside.items()} == older
    assert {str(path) for path in aside.values()} <= set(report.set_aside)
    assert (settings.output / "chains.jsonl").read_bytes() == b""
    assert not (settings.output / "statistics.html").exists()  # there is nothing to describe
    build(settings.model_copy(update={"models": {"default": dead}}))
    assert not (settings.output / "chains.2.jsonl").exists()


@pytest.mark.usefixtures("real_page")
def test_results_that_cannot_be_written_leave_the_older_ones_together(
    make_settings: Make, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(serve(answer).url)
    build(settings)
    older = {path.name: path.read_bytes() for path in settings.output.iterdir()}
    syncs_left = [0]

    def full(fd: int) -> None:
        syncs_left[0] -= 1
        if not syncs_left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")

    for last in range(1, 5):
        syncs_left[0] = last
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=r"No space left on device: '.*/out/\w+\.\w+'"):
                build(settings.model_copy(update={"deduplicate": None, "seed": settings.seed}))
        assert {path.name: path.read_bytes() for path in settings.output.iterdir()} == older


def test_ctrl_c_while_results_are_written_leaves_the_older_ones(
    make_settings: Make, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(serve(answer).url)
    build(settings)
    older = {path.name: path.read_bytes() for path in settings.output.iterdir()}
    monkeypatch.setattr("axolotl_mote.builder.output.results.write_html", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(settings.model_copy(update={"questions": settings.questions * 2}))
    assert {path.name: path.read_bytes() for path in settings.output.iterdir()} == older


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# --- recording ------------------------------------------------------------------------------------------------------


def test_texts_that_arrive_together_share_a_sync(
    make_settings: Make, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a disk that takes 20 ms, and everything the journal reports as recorded is on disk before it goes on."""
    syncs = []
    fsync = os.fsync

    def slow(fd: int) -> None:
        time.sleep(0.02)
        syncs.append(fd)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    server = serve(answer)
    settings = make_settings(server.url, count=64, server={"concurrency": 32}, chain="response", check=False)
    assert build(settings).counts["kept"] == 64
    calls = (settings.output / "journal.jsonl").read_text().splitlines()[1:]
    assert len(calls) == len({json.loads(line)["call"] for line in calls}) == 64
    assert len(syncs) < 32  # 68 with a sync for each


def test_a_text_counts_once_it_is_on_disk(make_settings: Make, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(serve(answer).url, count=24, server={"concurrency": 8}, chain="response", check=False)
    journal = settings.output / "journal.jsonl"
    fsync, durable, early = os.fsync, [0], []

    def sync(fd: int) -> None:
        size = os.fstat(fd).st_size
        time.sleep(0.005)
        fsync(fd)
        if journal.exists() and os.fstat(fd).st_ino == journal.stat().st_ino:
            durable[0] = journal.read_bytes()[:size].count(b"\n") - 1

    monkeypatch.setattr(os, "fsync", sync)
    build(settings, on_progress=lambda status: early.append(status.done - durable[0]))
    assert max(early) <= 0
    assert len(early) == 25


def test_a_disk_that_fills_up_stops_the_build_and_counts_nothing(
    make_settings: Make, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(serve(answer).url, count=16, server={"concurrency": 8})
    journal = settings.output / "journal.jsonl"
    fsync = os.fsync

    def full(fd: int) -> None:
        if os.fstat(fd).st_size > 3000 and os.fstat(fd).st_ino == journal.stat().st_ino:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*journal\.jsonl'"):
            build(settings)
    assert journal.stat().st_size <= 3000
    assert journal.read_bytes().endswith(b"\n")
    assert build(settings).counts["pending"] == 0
