"""A whole evaluation: killed, interrupted, broken and repaired runs end as an uninterrupted one does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

import kit
import scripted_models
from click.testing import CliRunner
from inspect_ai.log import read_eval_log
from scripted_models import record_calls, rows_of

from axolotl_mote.cli.eval import command
from axolotl_mote.evaluation import systems
from axolotl_mote.evaluation.run import run
from axolotl_mote.evaluation.running.cells import plan
from axolotl_mote.evaluation.running.costs import costs
from axolotl_mote.evaluation.settings import Settings
from axolotl_mote.files import AppendLog, FileInUseError
from axolotl_mote.generation.api import generate_chain
from axolotl_mote.report import Page

HERE = Path(__file__).parent
RESULTS = ("results.jsonl", "summary.json", "report.html")
BASE = {"name": "base", "inspect_model": "scripted/base", "concurrency": 3}
GRADER = {"inspect_model": "scripted/grader"}
XSTEST = {"name": "xstest", "limit": 12}


@pytest.fixture(autouse=True)
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The calls of scripted models so far."""
    path = record_calls(tmp_path, monkeypatch)
    return lambda: path.read_text(encoding="utf-8").splitlines()


def settings(output: Path, **changed: Any) -> Settings:
    return Settings.model_validate({"output": output, "systems": [BASE], "tasks": [XSTEST], **changed})


def files_of(output: Path) -> dict[str, bytes]:
    return {name: (output / name).read_bytes() for name in RESULTS}


def logs_of(output: Path) -> list[Path]:
    return sorted(output.glob("logs/**/*.eval"))


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a run; for tests that do not look at the page."""
    monkeypatch.setattr(Page, "plots", lambda self, plots: None)


def write_config(output: Path, **changed: Any) -> Path:
    """An evaluation file beside its output."""
    given = settings(output, **changed).model_dump(mode="json")
    for part in (*given["systems"], *given["tasks"]):
        for key in [key for key, value in part.items() if value in (None, [], {}, "")]:
            del part[key]
    config = output.with_suffix(".yml")
    config.write_text(json.dumps(given), encoding="utf-8")
    return config


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    code = "import sys, scripted_models; from axolotl_mote.cli.eval import command; command([sys.argv[1]])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(write_config(tmp_path / "killed"))],
        env={**os.environ, "SCRIPTED_SLEEP": "0.25", "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while len(calls()) < 8:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=300)
    killed_at = len(calls())
    report = run(settings(tmp_path / "killed"))
    assert 0 < report.answered < 12
    assert len(calls()) - killed_at == report.answered
    assert sum(count - 1 for count in Counter(calls()).values()) <= 3  # those in flight
    assert len(logs_of(tmp_path / "killed")) == 1
    run(settings(tmp_path / "whole"))
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@contextmanager
def interrupted_after(calls: Callable[[], list[str]], count: int) -> Iterator[None]:
    """Ctrl-C inside the block, once models were called so often."""
    left = threading.Event()

    def interrupt() -> None:
        while len(calls()) < count:
            if left.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_writes_what_is_there_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Callable[[], list[str]]
) -> None:
    both = {"systems": [BASE, {**BASE, "name": "other"}]}
    monkeypatch.setenv("SCRIPTED_SLEEP", "0.1")
    with interrupted_after(calls, 7):
        done = CliRunner().invoke(command, [str(write_config(tmp_path / "out", **both))])
    assert done.exit_code == 130, done.output
    assert "Run the same command again to continue." in done.output
    monkeypatch.delenv("SCRIPTED_SLEEP")
    assert 0 < sum(row["error"] is None for row in rows_of(tmp_path / "out")) < 12
    assert run(settings(tmp_path / "out", **both)).faults == []
    assert Counter(calls()).most_common(1)[0][1] <= 3
    run(settings(tmp_path / "whole", **both))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_finished_run_asks_nothing_again(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    every = {"tasks": [XSTEST, {"name": "strongreject", "limit": 3, "transforms": ["none", "rot13"]}], "grader": GRADER}
    first = run(settings(tmp_path / "out", **every))
    assert (first.answered, first.faults, first.interrupted) == (18, [], False)
    done, before = len(calls()), files_of(tmp_path / "out")
    assert done == 18 + 6
    again = run(settings(tmp_path / "out", **every))
    assert (again.answered, again.judged, len(calls())) == (0, 0, done)
    assert files_of(tmp_path / "out") == before


def test_failed_prompts_are_rows_with_errors_and_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Callable[[], list[str]]
) -> None:
    monkeypatch.setenv("SCRIPTED_FAIL", "How")
    report = run(settings(tmp_path / "out"))
    failed = [row for row in rows_of(tmp_path / "out") if row["error"] is not None]
    assert 0 < len(failed) < 12
    assert all(row["scores"] == {} and "no answer to How" in row["error"] for row in failed)
    assert report.faults == [f"base, xstest: {len(failed)} of 12 answers are missing: {len(failed)} failed"]
    figures = report.summary.figures[0]
    assert figures.errors == len(failed) == sum(e.unscored for e in figures.measures.values())
    monkeypatch.delenv("SCRIPTED_FAIL")
    before = len(calls())
    assert run(settings(tmp_path / "out")).faults == []
    assert len(calls()) - before == len(failed)
    run(settings(tmp_path / "whole"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# --- servers --------------------------------------------------------------------------------------------------------


def served(address: str, **changed: Any) -> dict[str, Any]:
    return {"name": "served", "server": address, "model": "m", "concurrency": 2, "retry_for": 1, **changed}


@pytest.mark.usefixtures("no_plots")
def test_a_server_that_dies_loses_nothing_and_the_others_go_on(tmp_path: Path) -> None:
    def dies(number: int, body: dict[str, Any], key: str) -> tuple[int, str]:
        return (0 if number > 5 else 200), f"Sure: {body['messages'][-1]['content']}"

    with scripted_models.server(dies) as (address, seen):
        report = run(settings(tmp_path / "out", systems=[served(address), BASE]))
    rows = rows_of(tmp_path / "out")
    assert sum(row["system"] == "served" and row["error"] is None for row in rows) == 5
    assert sum(row["system"] == "base" for row in rows) == 12
    assert report.faults[0].startswith("served, xstest: 7 of 12 answers are missing: ")
    dead = run(settings(tmp_path / "out", systems=[served(address), BASE]))
    assert "does not answer" in dead.faults[0]
    assert sum(row["error"] is None for row in rows_of(tmp_path / "out")) == 17

    with scripted_models.server(lambda n, body, key: (200, "Sure.")) as (elsewhere, seen_later):
        report = run(settings(tmp_path / "out", systems=[served(elsewhere), BASE]))
    assert report.faults == []
    assert len(seen_later) == 7
    assert not set(seen_later) & set(seen[:5])


def test_keys_never_reach_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = 'sk-"Zq7\\x9Kw"'
    monkeypatch.setenv("MY_KEY", secret)
    lines: list[str] = []

    def repeats(number: int, body: dict[str, Any], key: str) -> tuple[int, str]:
        assert key == f"Bearer {secret}"
        return (400, f"wrong key {key}") if number % 4 == 0 else (200, "Sure.")

    with scripted_models.server(repeats) as (address, _):
        report = run(settings(tmp_path / "out", systems=[served(address, api_key_env="MY_KEY")]), tell=lines.append)
    assert report.faults
    texts = [
        path.read_text("utf-8") for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".jsonl", ".html")
    ]
    texts += [
        read_eval_log(str(path), resolve_attachments="full").model_dump_json() for path in logs_of(tmp_path / "out")
    ]
    texts += [json.dumps(text) for text in (*lines, *report.faults)]
    assert any("$MY_KEY" in text for text in texts)
    assert not any("Zq7" in text or "x9Kw" in text for text in texts)


def test_a_key_that_is_not_set_is_said_before_anything_runs(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    with pytest.raises(ValueError, match="NO_SUCH_KEY must be set"):
        run(settings(tmp_path / "out", systems=[BASE, served("http://x/v1", api_key_env="NO_SUCH_KEY")]))
    assert calls() == []


# --- judges ---------------------------------------------------------------------------------------------------------

STRONGREJECT = {"name": "strongreject", "limit": 4}


def test_a_dead_grader_costs_its_scores_alone(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    dead = {"server": "http://127.0.0.1:9/v1", "model": "judge"}
    report = run(settings(tmp_path / "out", tasks=[STRONGREJECT], grader=dead))
    assert any("does not answer" in fault for fault in report.faults)
    rows = rows_of(tmp_path / "out")
    assert {row["scores"]["strongreject"]["status"] for row in rows} == {"failed"}
    assert {row["scores"]["refusal"]["status"] for row in rows} == {"scored"}
    before = len(calls())
    repaired = run(settings(tmp_path / "out", tasks=[STRONGREJECT], grader=GRADER))
    assert (repaired.answered, repaired.judged, repaired.faults) == (0, 4, [])
    assert all(json.loads(line)[0] == "grader" for line in calls()[before:])
    run(settings(tmp_path / "whole", tasks=[STRONGREJECT], grader=GRADER))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_without_a_grader_nothing_is_safe(tmp_path: Path) -> None:
    lines: list[str] = []
    report = run(settings(tmp_path / "out", tasks=[STRONGREJECT]), tell=lines.append)
    assert any("There is no grader" in line for line in lines)
    found = report.summary.figures[0].measures["harmfulness"]
    assert (found.n, found.unscored, found.worst) == (0, 4, 1.0)
    assert report.faults == []


@pytest.mark.usefixtures("no_plots")
def test_another_judge_judges_again_and_generates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Callable[[], list[str]]
) -> None:
    run(settings(tmp_path / "out", tasks=[STRONGREJECT], grader=GRADER))
    done = len(calls())
    more = {**STRONGREJECT, "judge_chain": True}
    report = run(settings(tmp_path / "out", tasks=[more], grader=GRADER))
    assert (report.answered, report.judged) == (0, 4)
    assert {json.loads(line)[0] for line in calls()[done:]} == {"grader"}
    assert "harmfulness_chain" in report.summary.figures[0].measures
    other = run(settings(tmp_path / "out", tasks=[more], grader={"inspect_model": "scripted/other-grader"}))
    assert other.judged == 4
    assert {row["scores"]["strongreject"]["judge"]["name"] for row in rows_of(tmp_path / "out")} == {
        "scripted/other-grader"
    }
    fewer = run(settings(tmp_path / "out", tasks=[STRONGREJECT], grader={"inspect_model": "scripted/other-grader"}))
    assert fewer.judged == 0
    assert set(rows_of(tmp_path / "out")[0]["scores"]) == {"refusal", "strongreject"}


# --- settings, seeds, locks -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_plots")
def test_answers_under_other_settings_are_never_taken(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    run(settings(tmp_path / "out"))
    assert run(settings(tmp_path / "out", max_new_tokens=7)).answered == 12
    assert len(calls()) == 24
    back = run(settings(tmp_path / "out"))
    assert (back.answered, len(calls())) == (0, 24)


def test_epochs_and_the_same_seed_give_the_same_numbers(tmp_path: Path) -> None:
    sampled = {"sampling": {"temperature": 1, "seed": 3}, "epochs": 2, "tasks": [{"name": "coconot", "limit": 5}]}
    for name in ("one", "two"):
        run(settings(tmp_path / name, **sampled))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert [row["epoch"] for row in rows_of(tmp_path / "one")] == [1, 2] * 5


def test_two_runs_never_share_a_folder(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    with AppendLog(tmp_path / "out" / "runs.jsonl"), pytest.raises(FileInUseError):
        run(settings(tmp_path / "out"))
    assert calls() == []


def test_nothing_but_the_named_servers_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []
    connect = socket.socket.connect

    def note(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            reached.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", note)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    run(settings(tmp_path / "out", tasks=[XSTEST, STRONGREJECT], grader=GRADER))
    assert reached == []


def test_faults_of_tasks_and_systems_are_said_at_once(tmp_path: Path) -> None:
    wrong = {
        "systems": [{"name": "gone", "adapter": str(tmp_path / "gone")}],
        "tasks": [
            {"name": "strongreject", "transforms": ["odd"]},
            {"name": "custom", "path": str(tmp_path / "none.jsonl")},
        ],
    }
    with pytest.raises(ValueError, match="got 3 faults") as error:
        plan(settings(tmp_path / "out", **wrong))
    assert all(name in str(error.value) for name in ("systems.gone", "tasks.strongreject", "tasks.custom"))


@pytest.mark.usefixtures("no_plots")
def test_costs(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    both = {"tasks": [XSTEST, STRONGREJECT], "grader": GRADER, "max_new_tokens": 50}
    before = costs(settings(tmp_path / "out", **both))
    assert [(c.answers, c.judge_calls, c.most_tokens) for c in before] == [(12, 0, 600), (4, 4, 200)]
    assert all(c.tokens is None and c.seconds is None and c.prompt_tokens > 0 for c in before)
    assert calls() == []
    assert not (tmp_path / "out").exists()
    run(settings(tmp_path / "out", **both))
    assert [(c.answers, c.judge_calls, c.tokens) for c in costs(settings(tmp_path / "out", **both))] == [(0, 0, 0)] * 2
    more = costs(settings(tmp_path / "out", **{**both, "tasks": [{"name": "xstest", "limit": 20}]}))[0]
    assert more.answers == 20
    assert more.tokens is not None
    assert more.seconds is not None
    assert more.seconds > 0


# --- names and ids that change --------------------------------------------------------------------------------------


def test_a_renamed_system_or_task_keeps_its_answers(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    run(settings(tmp_path / "out"))
    done = len(calls())
    renamed = {"systems": [{**BASE, "name": "renamed"}], "tasks": [{**XSTEST, "label": "other"}]}
    assert [cost.answers for cost in costs(settings(tmp_path / "out", **renamed))] == [0]
    report = run(settings(tmp_path / "out", **renamed))
    assert (report.answered, report.faults, len(calls())) == (0, [], done)
    assert {(row["system"], row["task"]) for row in rows_of(tmp_path / "out")} == {("renamed", "other")}
    run(settings(tmp_path / "whole", **renamed))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    more = run(settings(tmp_path / "out", max_new_tokens=7, **renamed))
    assert more.answered == 12


@pytest.mark.usefixtures("no_plots")
def test_two_systems_of_one_model_have_answers_of_their_own(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    """Whoever names a model twice wants it asked twice."""
    run(settings(tmp_path / "out"))
    report = run(settings(tmp_path / "out", systems=[{**BASE, "name": "again"}, BASE]))
    assert (report.answered, len(calls())) == (12, 24)
    assert len({path.parent for path in logs_of(tmp_path / "out")}) == 2
    both = run(settings(tmp_path / "out", systems=[{**BASE, "name": "one"}, {**BASE, "name": "two"}]))
    assert (both.answered, len(calls())) == (0, 24)
    assert Counter(row["system"] for row in rows_of(tmp_path / "out")) == {"one": 12, "two": 12}


def test_ids_that_changed_between_two_runs_are_said(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    task = {"tasks": [{"name": "custom", "path": str(own)}]}

    def write(prefix: str) -> None:
        rows = [{"id": f"{prefix}{n}", "prompt": f"Question {n}?", "label": "safe"} for n in range(4)]
        own.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("a")
    run(settings(tmp_path / "out", **task))
    write("b")
    both = {**task, "systems": [BASE, {**BASE, "name": "later"}]}
    done = CliRunner().invoke(command, [str(write_config(tmp_path / "out", **both))])
    words = "later against base, custom, over-refusal: not compared."
    assert words in done.stdout
    assert words in json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["not_compared"][0]
    assert words in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


# --- real models, the command ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_plots")
def test_a_mote_adapter_in_two_modes(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model, tokenizer = kit.tiny_model(), kit.tiny_tokenizer(kit.STEPS)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapted = kit.random_adapter(model, tokenizer)
    adapter = kit.save_adapter(adapted, tokenizer, tmp_path / "adapter", base)
    systems = [{"name": "base", "model": str(base)}]
    systems += [{"name": "mote", "adapter": str(adapter), "steps": ["response", "adaptive"]}]
    tasks = [{"name": "custom", "path": str(tmp_path / "own.jsonl"), "scorers": ["refusal"]}]
    lines = [{"prompt": f"{word} ?", "label": "safe"} for word in ("a", "b c", "d e f")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    report = run(settings(tmp_path / "out", systems=systems, tasks=tasks, max_new_tokens=24))
    assert report.faults == []
    rows = rows_of(tmp_path / "out")
    assert Counter((row["system"], row["steps"]) for row in rows) == {
        ("base", "plain"): 3,
        ("mote", "response"): 3,
        ("mote", "adaptive"): 3,
    }
    for row in (row for row in rows if row["system"] == "mote"):
        steps = ["response"] if row["steps"] == "response" else "adaptive"
        chain = generate_chain(adapted, tokenizer, row["messages"], steps, 24)
        assert (row["texts"], row["token_counts"], row["output_tokens"]) == (
            chain.texts,
            chain.token_counts,
            chain.spent,
        )


@pytest.mark.usefixtures("no_plots")
def test_one_local_system_is_loaded_at_a_time_and_the_grader_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("one", "two", "judge")
    for name in names:
        model = kit.tiny_model()
        if name == "judge":
            model.generation_config.eos_token_id = list(range(259))  # what it says does not matter
        model.save_pretrained(tmp_path / name)
        kit.tiny_tokenizer(()).save_pretrained(tmp_path / name)
    weights: dict[str, weakref.ref[Any]] = {}
    there: list[tuple[str, list[str]]] = []

    def load(name: str, **options: Any) -> Any:
        there.append((Path(name).name, [n for n, weight in weights.items() if weight() is not None]))
        model = load_base(name, **options)
        weights[Path(name).name] = weakref.ref(model.get_input_embeddings().weight)
        return model

    load_base = systems.load_base
    monkeypatch.setattr(systems, "load_base", load)
    local = [{"name": name, "model": str(tmp_path / name)} for name in names[:2]]
    tasks = [{**STRONGREJECT, "limit": 1}, {"name": "xstest", "limit": 1}]
    grader = {"model": str(tmp_path / "judge")}
    report = run(settings(tmp_path / "out", systems=local, tasks=tasks, grader=grader, max_new_tokens=4))
    assert report.answered == 4
    assert there == [("one", []), ("judge", ["one"]), ("two", ["judge"])]
    assert [name for name, weight in weights.items() if weight() is not None] == []
    with pytest.raises(ValueError, match="grader: model must be a folder"):
        plan(settings(tmp_path / "out", grader={"model": str(tmp_path)}))


def test_the_command(tmp_path: Path) -> None:
    config = tmp_path / "eval.yml"
    config.write_text(json.dumps({"output": "unused", "systems": [BASE], "tasks": [XSTEST]}), encoding="utf-8")
    arguments = [str(config), "--output", str(tmp_path / "out"), "--limit", "4"]
    dry = CliRunner().invoke(command, [*arguments, "--dry-run", "--json"])
    assert json.loads(dry.stdout)["total"] == {"answers": 4, "judge_calls": 0, "most_tokens": 4096}
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    assert "unsafe" in done.stdout
    told = CliRunner().invoke(command, [*arguments, "--report-only", "--json"])
    assert json.loads(told.stdout)["figures"][0]["planned"] == 4
    assert (json.loads(told.stdout)["missing"], told.exit_code) == ([], 0)
    both = CliRunner().invoke(command, [*arguments, "--report-only", "--dry-run"])
    assert both.exit_code == 2
    config.write_text("systems: 3", encoding="utf-8")
    broken = CliRunner().invoke(command, arguments)
    assert broken.exit_code == 1
    assert "must follow the schema of the evaluation file" in broken.output


@pytest.mark.usefixtures("no_plots")
def test_the_report_alone_says_what_the_run_lacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIPTED_FAIL", "How")
    dead = {"server": "http://127.0.0.1:9/v1", "model": "m"}
    both = {"systems": [BASE, {"name": "dead", **dead}], "tasks": [XSTEST, STRONGREJECT], "grader": dead}
    config = str(write_config(tmp_path / "out", **both))
    done = CliRunner().invoke(command, [config, "--json"])
    missing = json.loads(done.stdout)["missing"]
    assert missing[0].startswith("grader: http://127.0.0.1:9/v1 does not answer")
    assert any(": the judge failed on " in words for words in missing)
    assert any(words.startswith("dead, xstest: 12 of 12 answers are missing: http://127.0.0.1") for words in missing)
    assert json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["missing"] == missing
    told = CliRunner().invoke(command, [config, "--report-only", "--json"])
    assert json.loads(told.stdout)["missing"] == missing
    assert (done.exit_code, told.exit_code) == (3, 3)
    shown = CliRunner().invoke(command, [config, "--report-only"])
    assert all(f"Missing: {words}" in shown.stdout for words in missing)
    assert "Run it without --report-only to continue." in shown.stdout
