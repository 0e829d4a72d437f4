"""Scores after a grader was changed, taken away or died; keys in logs; damaged logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

import scripted_models
from inspect_ai.log import read_eval_log
from scripted_models import record_calls, rows_of

from axolotl_mote.evaluation import run as run_module
from axolotl_mote.evaluation.run import run
from axolotl_mote.evaluation.running import judging
from axolotl_mote.evaluation.settings import Settings
from axolotl_mote.report import Page

HERE = Path(__file__).parent
BASE = {"name": "base", "inspect_model": "scripted/base", "concurrency": 3}
GRADER = {"inspect_model": "scripted/grader"}
OTHER = {"inspect_model": "scripted/other-grader"}
TASK = {"name": "strongreject", "limit": 6}
CHAIN = {**TASK, "judge_chain": True}


@pytest.fixture(autouse=True)
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Names of the scripted models called so far; without plots, which take half of a run."""
    path = record_calls(tmp_path, monkeypatch)
    monkeypatch.setattr(Page, "plots", lambda self, plots: None)
    return lambda: [json.loads(line)[0] for line in path.read_text(encoding="utf-8").splitlines()]


def settings(output: Path, **changed: Any) -> Settings:
    return Settings.model_validate({"output": output, "systems": [BASE], "tasks": [TASK], **changed})


def judges(output: Path, scorer: str = "strongreject") -> Counter[str]:
    scores = [row["scores"].get(scorer) for row in rows_of(output)]
    return Counter(score["judge"]["name"] for score in scores if score)


def statuses(output: Path, scorer: str = "strongreject") -> Counter[str]:
    return Counter(row["scores"][scorer]["status"] for row in rows_of(output) if scorer in row["scores"])


def log_of(output: Path) -> Path:
    (path,) = output.glob("logs/**/*.eval")
    return path


# --- one judge per cell ---------------------------------------------------------------------------------------------


def test_resumed_with_another_grader_all_scores_are_its(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Callable[[], list[str]]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("SCRIPTED_FAIL", "into")  # in three prompts, not in the judge's
    run(settings(out, tasks=[{**TASK, "limit": 12}], grader=GRADER))
    first = judges(out)["scripted/grader"]
    assert first == 9
    monkeypatch.delenv("SCRIPTED_FAIL")
    report = run(settings(out, tasks=[{**TASK, "limit": 12}], grader=OTHER))
    assert judges(out) == {"scripted/other-grader": 12}
    assert (report.judged, report.faults) == (first, [])
    assert Counter(calls())["other-grader"] == 12
    assert run(settings(out, tasks=[{**TASK, "limit": 12}], grader=OTHER)).judged == 0


def test_judging_stopped_midway_never_mixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(settings(out, grader=GRADER))
    whole = (out / "results.jsonl").read_bytes()
    replace, written = judging.replace_log, []

    def stops(*given: Any) -> None:
        replace(*given)
        written.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(judging, "_JUDGED_TOGETHER", 2)
    monkeypatch.setattr(judging, "replace_log", stops)
    report = run(settings(out, grader=OTHER))
    assert report.interrupted
    assert len(written) == 1
    assert judges(out) == {"scripted/grader": 4, "scripted/other-grader": 2}
    assert any("scores of strongreject are by 2 judges (4 by scripted/grader, 2 by" in f for f in report.faults)
    monkeypatch.setattr(judging, "replace_log", replace)
    report = run(settings(out, grader=GRADER))
    assert (report.judged, report.faults) == (2, [])
    assert (out / "results.jsonl").read_bytes() == whole


# --- a grader that is gone ------------------------------------------------------------------------------------------


def grades(number: int, body: dict[str, Any], key: str) -> tuple[int, str]:
    return 200, "VERDICT: refusal=0 convincing=3 specific=3"


def test_a_dead_grader_loses_no_score(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with scripted_models.server(grades) as (address, _):
        served = {"server": address, "model": "m", "retry_for": 1}
        run(settings(out, grader=served))
    before = [row["scores"] for row in rows_of(out)]
    report = run(settings(out, tasks=[CHAIN], grader=served))
    assert any("does not answer" in fault for fault in report.faults)
    after = [row["scores"] for row in rows_of(out)]
    assert statuses(out, "strongreject_chain") == {"failed": 6}
    assert [{name: scores[name] for name in given} for given, scores in zip(before, after, strict=True)] == before


def test_what_a_new_grader_fails_on_keeps_its_score_and_is_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(settings(out, grader=GRADER))
    before = rows_of(out)

    def refuses(number: int, body: dict[str, Any], key: str) -> tuple[int, str]:
        return 400, "no"

    with scripted_models.server(refuses) as (address, _):
        report = run(settings(out, grader={"server": address, "model": "m", "retry_for": 1}))
    assert rows_of(out) == before
    assert any("scores of strongreject are by an earlier grader" in fault for fault in report.faults)
    report = run(settings(out, grader=OTHER))
    assert (report.judged, report.faults) == (6, [])
    assert judges(out) == {"scripted/other-grader": 6}


def test_only_what_is_stale_is_judged(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    out = tmp_path / "out"
    run(settings(out, grader=GRADER))
    assert run(settings(out, tasks=[CHAIN], grader=GRADER)).judged == 6
    assert Counter(calls()) == {"base": 6, "grader": 12}
    run(settings(tmp_path / "whole", tasks=[CHAIN], grader=GRADER))
    assert (out / "results.jsonl").read_bytes() == (tmp_path / "whole" / "results.jsonl").read_bytes()
    counts = [
        [sample.scores["counts"].value for sample in read_eval_log(str(log_of(path))).samples]
        for path in (out, tmp_path / "whole")
    ]
    assert repr(counts[0]) == repr(counts[1])


def test_a_grader_that_was_taken_away_is_not_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with scripted_models.server(grades) as (address, seen):
        run(settings(out, grader={"server": address, "model": "m", "retry_for": 1}))
        asked = len(seen)
        run(settings(out, tasks=[CHAIN]))
        assert len(seen) == asked == 6
    assert statuses(out) == {"scored": 6}
    assert statuses(out, "strongreject_chain")["scored"] == 0


# --- inspect score --------------------------------------------------------------------------------------------------

SCORE = "import scripted_models\nfrom inspect_ai._cli.main import main\nmain()"


def values_of(log: Any) -> str:
    """Every score and every figure of a log."""
    scores = [{name: score.value for name, score in sample.scores.items()} for sample in log.samples]
    figures = [(score.name, [metric.value for metric in score.metrics.values()]) for score in log.results.scores]
    return repr([scores, figures])  # NaN is equal to NaN in it


def test_inspect_score_needs_no_names_of_scorers(tmp_path: Path) -> None:
    """A log names the scorers of its task so that inspect_ai finds them in another process."""
    out, scored = tmp_path / "out", tmp_path / "scored.eval"
    run(settings(out, grader=GRADER))
    log = log_of(out)
    done = subprocess.run(
        [sys.executable, "-c", SCORE, "score", str(log), "--action", "overwrite", "--output-file", str(scored)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found, again = read_eval_log(str(log)), read_eval_log(str(scored))
    assert [scorer.name for scorer in found.eval.scorers] == [f"axolotl_mote/{n}" for n in found.samples[0].scores]
    assert values_of(found) == values_of(again)
    run(settings(out, grader=OTHER))  # which judges again
    assert read_eval_log(str(log)).eval.scorers == found.eval.scorers


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["EMPTY", "1", "Sure, the list"])
def test_a_key_never_changes_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("MY_KEY", key)
    answer = "Sure, the list is EMPTY now and x = 1, a no."

    def reply(number: int, body: dict[str, Any], key: str) -> tuple[int, str]:
        return (400, f"wrong {key}") if number == 2 else (200, answer)

    with scripted_models.server(reply) as (address, _):
        system = {"name": "s", "server": address, "model": "m", "retry_for": 1, "api_key_env": "MY_KEY"}
        tasks = [{"name": "xstest", "limit": 4}]
        report = run(settings(tmp_path / "out", systems=[system], tasks=tasks))
        assert len(report.faults) == 1
        assert run(settings(tmp_path / "out", systems=[system], tasks=tasks)).faults == []
    assert [row["answer"] for row in rows_of(tmp_path / "out")] == [answer] * 4


def test_a_key_is_taken_out_after_ctrl_c_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-123456789")
    answer = run_module.answer

    def interrupted(*given: Any) -> Any:
        answer(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "answer", interrupted)
    with scripted_models.server(lambda n, body, key: (400, f"wrong {key}")) as (address, _):
        system = {"name": "s", "server": address, "model": "m", "retry_for": 1, "api_key_env": "MY_KEY"}
        assert run(settings(tmp_path / "out", systems=[system])).interrupted
    text = read_eval_log(str(log_of(tmp_path / "out")), resolve_attachments="full").model_dump_json()
    assert "$MY_KEY" in text
    assert "sk-123456789" not in text


# --- damaged logs ---------------------------------------------------------------------------------------------------


def test_a_damaged_log_is_as_a_torn_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(settings(out, grader=GRADER))
    whole, path = (out / "results.jsonl").read_bytes(), log_of(out)
    good = path.read_bytes()
    for place in range(0, len(good), len(good) // 4):
        log_of(out).unlink()
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        report = run(settings(out, grader=GRADER))
        assert report.faults == []
        assert (out / "results.jsonl").read_bytes() == whole
    log_of(out).unlink()
    path.write_bytes(good[: len(good) // 3] + b"\xff" * 64 + good[len(good) // 3 + 64 :])
    monkeypatch.setenv("SCRIPTED_FAIL", "o")
    report = run(settings(out, grader=GRADER))
    assert any(str(path) in fault and "cannot be read" in fault for fault in report.faults)
