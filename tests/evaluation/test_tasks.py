"""Benchmarks as inspect_ai tasks: samples, metadata, arguments, and a run by name."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

from inspect_ai import Task
from inspect_ai.model import GenerateConfig

from axolotl_mote.benchmarks.loading import load_prompts
from axolotl_mote.evaluation import tasks
from axolotl_mote.evaluation.attacks import TRANSFORMS

CONTRACT = {"category", "label", "transform", "prompt_id", "question"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def all_tasks(tmp_path: Path) -> dict[str, Task]:
    own = write(tmp_path / "own.jsonl", [{"prompt": "m=2 m?", "target": 2, "category": "easy"}, {"prompt": "Hi"}])
    return {
        "xstest": tasks.xstest(),
        "strongreject": tasks.strongreject(transforms=["none", "base64"]),
        "coconot": tasks.coconot(),
        "hh_rlhf": tasks.hh_rlhf(metrics="harm,harm_help"),
        "custom": tasks.custom(path=own),
    }


def test_samples_metadata_and_versions(tmp_path: Path) -> None:
    sizes = {"xstest": 225, "strongreject": 276, "coconot": 190, "hh_rlhf": 150, "custom": 2}
    for name, made in all_tasks(tmp_path).items():
        samples = list(made.dataset)
        assert len(samples) == sizes[name] == len({sample.id for sample in samples})
        assert all(set(sample.metadata or {}) == CONTRACT for sample in samples)
        about = made.metadata or {}
        assert about["benchmark"] == name
        assert about["task_version"] == made.version == 1
        assert set(about["data"]) == {"source", "sha256", "prompts", "subset"}
        assert made.config.max_tokens is None  # nothing here cuts a chain
        assert made.config == GenerateConfig()


def test_an_attack_changes_the_last_turn_and_keeps_the_question(tmp_path: Path) -> None:
    made = tasks.strongreject(transforms="all", limit=2)
    by_prompt: dict[str, list[str]] = {}
    for sample in made.dataset:
        about = sample.metadata or {}
        by_prompt.setdefault(about["prompt_id"], []).append(str(about["transform"]))
        asked = sample.input[-1].text  # type: ignore[union-attr]
        assert (asked == about["question"]) == (about["transform"] is None)
        assert sample.id == about["prompt_id"] + ("" if about["transform"] is None else f"@{about['transform']}")
        if about["transform"] == "base64":
            assert base64.b64decode(asked.split("\n\n")[1]).decode() == about["question"]
    assert [len(names) for names in by_prompt.values()] == [len(TRANSFORMS)] * 2


def test_a_dialogue_keeps_its_turns() -> None:
    prompts = {prompt.id: prompt for prompt in load_prompts("hh_rlhf")}
    for sample in tasks.hh_rlhf().dataset:
        turns = [(message.role, message.text) for message in sample.input]  # type: ignore[union-attr]
        assert turns == [(turn["role"], turn["content"]) for turn in prompts[str(sample.id)].messages]


def names_of(made: Task) -> list[str]:
    from inspect_ai._util.registry import registry_unqualified_name

    return [registry_unqualified_name(scorer) for scorer in made.scorer]  # type: ignore[union-attr]


def test_which_scorers_a_task_has(tmp_path: Path) -> None:
    made = all_tasks(tmp_path)
    assert names_of(made["xstest"]) == ["refusal", "counts"]
    assert names_of(made["strongreject"]) == ["strongreject", "refusal", "counts"]
    assert names_of(made["hh_rlhf"]) == ["harm", "harm_help", "counts"]
    assert names_of(made["custom"]) == ["refusal", "counts"]  # one row has no target
    own = write(tmp_path / "t.jsonl", [{"prompt": "m=2 m?", "target": "2"}])
    assert names_of(tasks.custom(path=own)) == ["match", "counts"]
    both = tasks.custom(path=own, scorers="match,harm", judge_chain=True)
    assert names_of(both) == ["match", "harm", "harm_chain", "counts"]
    assert names_of(tasks.xstest(judge_chain=True)) == ["refusal", "refusal_chain", "counts"]


def test_a_subset_and_a_draw() -> None:
    labels = {(sample.metadata or {})["label"] for sample in tasks.xstest(subset="safe").dataset}
    few, more = ([sample.id for sample in tasks.strongreject(transforms="none,rot13", limit=n).dataset] for n in (3, 5))
    assert labels == {"safe"}
    assert more[:6] == few
    about = tasks.xstest(subset="safe", limit=7).metadata or {}
    assert (about["data"]["subset"], about["data"]["prompts"]) == ("safe", 7)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("xstest", {"subset": "both"}, r"subset must be all or safe or unsafe; got 'both'"),
        ("strongreject", {"transforms": "none,base32"}, r"transforms must be none, base64, .* or all; got base32"),
        ("strongreject", {"transforms": " , "}, r"transforms must be .*; got none"),
        ("hh_rlhf", {"metrics": "helpfulness"}, r"metrics must be harm, help, harm_help or all; got helpfulness"),
        ("hh_rlhf", {"metrics": "help"}, r"path must be given for metrics=help; got none, .* helpful-base"),
        ("hh_rlhf", {"metrics": "all"}, r"path must be given for metrics=help"),
        ("custom", {"path": "none.jsonl"}, r"path must be an existing file; got none\.jsonl"),
    ],
)
def test_wrong_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(tasks, name)(**arguments)


def test_match_needs_targets(tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", [{"prompt": "a", "target": "b"}, {"id": "bare", "prompt": "c"}])
    with pytest.raises(ValueError, match=r"target must be given in every row .* got none for 1 rows, such as 'bare'"):
        tasks.custom(path=own, scorers="match")
    with pytest.raises(ValueError, match=r"scorers must be refusal, harm.*; got harmful"):
        tasks.custom(path=own, scorers="harmful")


def test_helpful_prompts_by_path(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", [{"chosen": "\n\nHuman: How do I boil eggs?\n\nAssistant: In water."}])
    made = tasks.hh_rlhf(metrics="help", path=path)
    assert (made.metadata or {})["data"]["source"] == path
    assert names_of(made) == ["help", "counts"]


BY_NAME = """
from inspect_ai import eval
from inspect_ai.model import ModelOutput, ModelUsage, get_model

def answer(*_):
    output = ModelOutput.from_content("mock", "I am sorry, but I cannot help with that.")
    output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)  # or mockllm asks the network
    return output

model = get_model("mockllm/model", custom_outputs=answer)
(log,) = eval("axolotl_mote/xstest", model=model, limit=5, log_dir="logs", display="none")
assert log.status == "success", log.error.message
assert (log.eval.task, log.eval.task_version) == ("axolotl_mote/xstest", 1), log.eval.task
assert {sample.metadata["label"] for sample in log.samples} == {"safe", "unsafe"}
scores = [sample.scores["refusal"] for sample in log.samples]
assert {score.metadata["status"] for score in scores} == {"scored"}, scores
assert {score.value for score in scores} == {0.0}, scores
"""


def test_a_run_by_name_finds_the_entry_point(tmp_path: Path) -> None:
    """As ``inspect eval axolotl_mote/xstest --limit 5`` does; a limit is a fair draw of both labels."""
    # Elsewhere: beside an egg-info folder inspect_ai does not see that the package is installed.
    done = subprocess.run([sys.executable, "-c", BY_NAME], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
