"""What is measured is not trained on: benchmarks by name under ``exclude:``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from axolotl_mote.benchmarks.loading import load_prompts
from axolotl_mote.benchmarks.sources import BENCHMARKS
from axolotl_mote.builder.settings import BenchmarkName, QuestionSource, load_settings
from axolotl_mote.builder.texts.questions import load_questions

BUILD = """
output: out
questions: [{path: q.jsonl}]
models: {default: {type: local, path: x}}
"""


def write(path: Path, rows: list[dict[str, object]]) -> QuestionSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return QuestionSource(path=str(path))


def test_every_benchmark_has_a_name_here() -> None:
    assert set(get_args(BenchmarkName)) == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_prompt_that_ships_is_excluded(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, object]] = [{"messages": list(prompt.messages)} for prompt in load_prompts(name)]
    fresh = {"prompt": "Which tea goes well with a lemon cake on a rainy day?"}
    questions, dropped = load_questions([write(tmp_path / "q.jsonl", [*rows, fresh])], [name])
    assert [question.messages[0]["content"] for question in questions] == [fresh["prompt"]]
    assert [row.reason for row in dropped].count("excluded") == len(rows)


def test_a_question_around_a_prompt_is_excluded(tmp_path: Path) -> None:
    inside = load_prompts("strongreject", limit=1)[0].messages[0]["content"]
    source = write(tmp_path / "q.jsonl", [{"prompt": f"A friend asked me: {inside.upper()} What do I say?"}])
    assert [row.reason for row in load_questions([source], ["strongreject"])[1]] == ["excluded"]
    assert load_questions([source], ["coconot"])[1] == []


def test_names_and_sources_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "build.yml").write_text(BUILD + "exclude: [xstest, {path: mine.jsonl}]\n")
    settings = load_settings(tmp_path / "build.yml")
    assert settings.exclude == ["xstest", QuestionSource(path="mine.jsonl")]
    assert settings.model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[xtest]", r"exclude must hold names of benchmarks \(coconot, hh_rlhf, strongreject, xstest\) or sources; "
         r"got 'xtest'. Correct the name, or write \{path: xtest\}"),
        ("xstest", "exclude: Input should be a valid list"),
        ("[3]", r"exclude\.0"),
        ("[{path: a, nam: b}]", "nam"),
    ],
)  # fmt: skip
def test_wrong_values(tmp_path: Path, value: str, message: str) -> None:
    (tmp_path / "build.yml").write_text(BUILD + f"exclude: {value}\n")
    with pytest.raises(ValueError, match=message):
        load_settings(tmp_path / "build.yml")
