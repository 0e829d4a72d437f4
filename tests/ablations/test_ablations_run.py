"""The runner: what is finished is never run again, what changed is, and nothing is lost in between."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import efficiency
import human_answers
import lookup
import pytest
import rows
import run
import table

from axolotl_mote.files import AppendLog

LOG = {
    "seconds": 1.0,
    "steps": 2,
    "heldout": [{"all": 3.0, "analysis": 3.0}, {"all": 1.0, "analysis": 0.5}],
    "loss": [[1, 2.0]],
    "order": "a",
}


def line(row: str = "mote", seed: int = 0, right: int = 150, order: str = "a", **changes: Any) -> dict[str, Any]:
    cell = {"right": right, "n": 200, "tokens": 30.0, "finished": 200}
    levels = dict.fromkeys(lookup.LEVELS, cell)
    return {
        "row": row, "seed": seed, "data": "lookup", "settings": "x", "configs": [], "rank": 2, "learning_rate": 0.004,
        "steps": 110, "batch": 8, "trainings": [{**LOG, "order": order}], "answers": {"adaptive": levels},
        "answer_seconds": 1.0, "machine": {"cpu": "a CPU", "threads": 1, "versions": {}}, **changes,
    }  # fmt: skip


class Fakes:
    """Stand-ins for training and answering that count their calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.trained: list[tuple[str, int]] = []
        self.results = tmp_path / "results.jsonl"
        self.fail: set[str] = set()
        self.killed_at: str | None = None
        monkeypatch.setattr(run, "train", self.train)
        monkeypatch.setattr(run, "answers", self.answers)
        monkeypatch.setattr(run, "WORK", tmp_path / "work")

    def train(self, job: run.Job) -> list[dict[str, Any]]:
        if job.name in self.fail:
            raise RuntimeError("it broke")
        self.trained.append((job.name, job.seed))
        return [LOG]

    def answers(self, job: run.Job) -> dict[str, Any]:
        if job.name == self.killed_at:
            raise KeyboardInterrupt
        return {"adaptive": {}}

    def main(self, *arguments: str) -> int:
        return run.main(["--results", str(self.results), "--steps", "2", "--per-level", "1", *arguments])

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.results.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fakes:
    return Fakes(monkeypatch, tmp_path)


def test_seed_by_seed_and_never_twice(fakes: Fakes) -> None:
    assert fakes.main("--rows", "mote,lora-r", "--seeds", "0,1") == 0
    assert fakes.trained == [("mote", 0), ("lora-r", 0), ("mote", 1), ("lora-r", 1)]
    assert fakes.main("--rows", "mote,lora-r", "--seeds", "0,1") == 0
    assert len(fakes.trained) == len(fakes.lines()) == 4
    assert len({found["settings"] for found in fakes.lines()}) == 4


def test_goes_on_after_a_kill(fakes: Fakes) -> None:
    fakes.killed_at = "lora-r"
    with pytest.raises(KeyboardInterrupt):
        fakes.main("--rows", "mote,lora-r", "--seeds", "0")
    fakes.killed_at = None
    with fakes.results.open("ab") as file:
        file.write(b'{"row": "lora-r", "se')  # torn by a kill while it was written
    assert fakes.main("--rows", "mote,lora-r", "--seeds", "0") == 0
    assert [found["row"] for found in fakes.lines()] == ["mote", "lora-r"]
    assert fakes.trained == [("mote", 0), ("lora-r", 0), ("lora-r", 0)]


def test_training_is_kept_when_answering_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained = []

    def axolotl_train(values: dict[str, Any], path: Path) -> float:
        trained.append(values["output_dir"])
        (tmp_path / values["output_dir"]).mkdir(parents=True)
        return 5.0

    monkeypatch.setattr(run, "_axolotl_train", axolotl_train)
    monkeypatch.setattr(run, "_history", lambda output: LOG)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "WORK", tmp_path / "work")
    job = run.Job("separate", 0, "lookup", rows.SIZES["lookup"], 1, 8, "model")
    (first, second, third), again = run.train(job), run.train(job)
    assert [first, second, third] == again
    assert len(set(trained)) == len(trained) == 3
    assert sorted(path.name for path in job.folder.glob("adapter-*")) == ["adapter-0", "adapter-1", "adapter-2"]
    files = {path.name: path.read_text(encoding="utf-8").count("\n") for path in job.folder.glob("*.jsonl")}
    assert files == {"train.jsonl": 640, "heldout.jsonl": run.HELDOUT_LOSS}


def test_changed_settings_are_run_anew(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.main("--rows", "mote", "--seeds", "0")
    fakes.main("--rows", "mote", "--seeds", "0", "--batch", "3")
    monkeypatch.setattr(rows, "load", lambda config, load=rows.load: load(config) | {"weight_decay": 0.1})
    fakes.main("--rows", "mote", "--seeds", "0")
    assert len(fakes.trained) == 3
    assert len({found["settings"] for found in fakes.lines()}) == 3


def test_a_failing_row_costs_only_itself(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.fail = {"mote"}
    assert fakes.main("--rows", "mote,lora-r", "--seeds", "0") == 1
    assert [found["row"] for found in fakes.lines()] == ["lora-r"]
    assert "FAILED" in capsys.readouterr().out


def test_tuning_comes_first_and_decides(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.3, 0.2, 0.1, 0.5, 0.05])  # rate by rate, within a rate lora and mote

    def train(job: run.Job) -> list[dict[str, Any]]:
        fakes.trained.append((job.name, job.seed))
        loss = next(losses) if job.data == "tuning" else 1.0
        return [LOG | {"heldout": [{"all": 3.0}, {"all": loss}]}]

    monkeypatch.setattr(run, "train", train)
    arguments = ["--results", str(fakes.results), "--rows", "mote-neither,lora-r", "--seeds", "0"]
    assert run.main(arguments) == 0
    tuned = [("lora-4r", 0), ("mote", 0), ("lora-4r", 0), ("mote", 0), ("mote", 0)]  # LoRA's highest beat its first
    assert fakes.trained == [*tuned, ("mote-neither", 0), ("lora-r", 0)]
    chosen = {found["row"]: found["learning_rate"] for found in fakes.lines() if found["data"] == "lookup"}
    assert chosen == {"lora-r": rows.RATES[1], "mote-neither": rows.RATES[2]}
    assert run.main(arguments) == 0
    assert len(fakes.trained) == 7


def test_a_failed_tuning_stops(fakes: Fakes) -> None:
    fakes.fail = {"mote"}
    assert run.main(["--results", str(fakes.results), "--rows", "mote-neither", "--seeds", "0"]) == 3
    assert fakes.trained == []


def test_tuning_reads_no_test_row() -> None:
    tests = {lookup.key(row) for row in lookup.test_rows()}
    for job in run.tuning_jobs(run.parse(["--rows", "mote"])):
        train, heldout = job.rows()
        assert not tests & {lookup.key(row) for row in [*train, *heldout, *job.asked("adaptive")]}
        assert not {lookup.key(row) for row in train} & {lookup.key(row) for row in [*heldout, *job.asked("adaptive")]}


def test_appending_waits_for_another_run(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run.append(path, {"row": "a"})
    with AppendLog(path), pytest.raises(ValueError, match="one process at a time"):
        run.append(path, {"row": "b"}, patience=0.3)
    run.append(path, {"row": "b"})
    assert run.finished(path) == {}
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("count", ["0", "201", "-1"])
def test_more_questions_than_there_are_is_refused(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse(["--per-level", count])
    assert "from 1 to 200" in capsys.readouterr().err


def test_unknown_rows_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse(["--rows", "mote,mooote"])
    assert "got mooote" in capsys.readouterr().err


def test_every_row_sees_the_same_rows() -> None:
    jobs = list(run.jobs(run.parse(["--rows", "main", "--seeds", "0"])))
    assert all(job.rows() == jobs[0].rows() and job.asked("adaptive") == jobs[0].asked("adaptive") for job in jobs)
    assert len({job.settings for job in jobs}) == len(jobs) == 7


# --- tables -----------------------------------------------------------------------------------------------------------


def test_interval_is_the_wider_one() -> None:
    same = table.interval([(200, 200)] * 3)
    assert same.low < 1  # Wilson's, where seeds agree
    assert same.high == 1
    apart = table.interval([(100, 200), (150, 200), (200, 200)])
    assert apart.low == pytest.approx(0.75 - 4.303 * 0.25 / 3**0.5)  # Student's, where they do not
    assert table.interval([(100, 200)]).low == pytest.approx(0.431, abs=1e-3)


def test_the_last_line_counts() -> None:
    found = table.latest(
        [line(right=1), line(right=2), line(seed=1), line(row="lora-r"), line(data="tuning")], "lookup"
    )
    assert list(found) == ["lora-r", "mote"]
    assert [one["answers"]["adaptive"]["easy"]["right"] for one in found["mote"]] == [2, 150]


def test_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, picture = tmp_path / "results.jsonl", tmp_path / "plot.svg"
    for one in (
        line(data="tuning", learning_rate=0.008),
        line(),
        line(seed=1, right=170),
        line(row="lora-r", order="b"),
        line(row="separate", trainings=[LOG] * 3),
    ):
        run.append(results, one)
    assert table.main([str(results), "--svg", str(picture)]) == 0
    page = capsys.readouterr().out
    assert "| `mote` | 2 | 400 | 80.0 (" in page
    assert "seed 0: lora-r / mote" in page
    assert "| kind | 0.008 |\n| --- | ---: |\n| mote | 1.0000 |" in page
    widths = [len(re.findall(r"(?<!\\)\|", text)) for text in page.splitlines() if text.startswith("|")]
    assert set(widths) == {3, 8}
    root = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    assert root.tag.endswith("svg")
    assert "one_sum" in picture.read_text(encoding="utf-8")


def test_page_of_safety_chains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    counts = {"safe": {"full_compliance": 8, "empty": 2, "cut off": 3}, "unsafe": {"full_refusal": 10, "cut off": 0}}
    run.append(results, line(data="safety", answers={"adaptive": counts}))
    assert table.main([str(results)]) == 0
    page = capsys.readouterr().out
    assert "| `mote` | 1 | 8 of 10 (49–94 %), 3 cut off | 0 of 10 (0–28 %), 0 cut off |" in page


# --- efficiency and answers of humans ---------------------------------------------------------------------------------


def test_efficiency_counts_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert efficiency.main(["--size", "tiny", "--epochs", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ratio"]["petaflops"] < 0.3
    assert result["masked"]["heldout_loss"] < result["heldout_loss_before"]


@pytest.mark.parametrize("name", ["petaflops", "seconds", "heldout_loss"])
def test_efficiency_misses_are_named(name: str) -> None:
    good = {"petaflops": 0.2, "seconds": 0.3, "heldout_loss": 1.01, "tokens": 0.2}
    assert efficiency.verdict(good) == []
    assert name in efficiency.verdict({**good, name: 1.1})[0]
    assert efficiency.verdict({**good, name: float("nan")})


def test_answers_of_humans(tmp_path: Path) -> None:
    transcripts = [
        "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: Because.\n\nIndeed.",
        "\n\nHuman: Hi",
        "\n\nAssistant: Hi",
        "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
        "\n\nHuman: a\n\nAssistant: ",
        "",
    ]
    source = tmp_path / "hh.jsonl"
    source.write_text("".join(json.dumps({"chosen": text}) + "\n\n" for text in transcripts), encoding="utf-8")
    assert human_answers.main([str(source), "--output", str(tmp_path / "out")]) == 0
    kept = [json.loads(text) for text in (tmp_path / "out/chains.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept == [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Why?"},
            ],
            "response": "Because.\n\nIndeed.",
        }
    ]
    source.write_text('{"prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="row 1"):
        human_answers.main([str(source), "--output", str(tmp_path / "out")])


def test_order_is_that_of_the_tokens_alone(tmp_path: Path) -> None:
    def history(name: str, analysis: int, speed: float) -> dict[str, Any]:
        folder = tmp_path / name / "checkpoint-2"
        folder.mkdir(parents=True)
        log = [
            {"step": 0, "eval_loss": 3.0, "eval_loss/analysis": 3.0},
            {"step": 1, "loss": 2.0, "tokens/analysis": analysis, "tokens/response": 8, "tokens/per_second": speed},
            {"step": 2, "eval_loss": 1.0, "eval_loss/analysis": 0.5},
        ]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}), encoding="utf-8")
        return run._history(tmp_path / name)

    first, second, other = history("a", 30, 1.0), history("b", 30, 2.0), history("c", 31, 1.0)
    assert first == second
    assert first["heldout"] == [{"analysis": 3.0, "all": 3.0}, {"analysis": 0.5, "all": 1.0}]
    assert first["order"] != other["order"]
