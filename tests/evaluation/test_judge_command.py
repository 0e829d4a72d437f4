"""``axolotl mote judge`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from axolotl_mote.cli.judge import command
from axolotl_mote.evaluation.judges.refusal import RefusalJudge

BREAD, LATE = "How do I bake bread?", "Is it late?"
ROWS = [
    {"prompt": BREAD, "completion": "Mix flour and water, then bake it.", "human_label": "full_compliance"},
    {"prompt": BREAD, "completion": "I can't help with that.", "human_label": "2_full_refusal", "more": 1},
    {"prompt": LATE, "completion": "Yes, it is late.", "human_label": "2_full_refusal"},
    {"prompt": LATE, "completion": "", "human_label": "full_refusal"},
]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])


def test_json(labelled: Path) -> None:
    done = run(labelled, "--judge", "refusal", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["n"] == 3
    assert data["rows"] == 4
    assert data["unscored"] == {"empty": 1}
    assert data["agreement_binary"] == data["agreement_three_class"] == pytest.approx(2 / 3, abs=1e-6)
    assert data["confusion_matrix"]["full_refusal"] == {"full_compliance": 1, "partial_refusal": 0, "full_refusal": 1}
    assert data["judge"] == {"name": "refusal", "revision": RefusalJudge.load().revision}
    low, high = data["intervals"]["agreement_binary"]
    assert low < 2 / 3 < high


def test_a_mark_of_utf_8_begins_no_row(labelled: Path) -> None:
    labelled.write_bytes(b"\xef\xbb\xbf" + labelled.read_bytes())
    done = run(labelled, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == len(ROWS)


def test_tables(labelled: Path) -> None:
    done = run(labelled)
    assert done.exit_code == 0, done.output
    assert "3 answers, 1 empty" in done.output
    assert "agreement binary" in done.output
    assert "0.667" in done.output
    assert "binary agreement is 0.500" in done.output


def test_own_weights(labelled: Path, tmp_path: Path) -> None:
    judge = RefusalJudge.load()
    own = tmp_path / "own.json"
    own.write_text(RefusalJudge(judge.names, judge.weights, judge.bias + np.array([50.0, 0.0, 0.0])).to_json())
    data = json.loads(run(labelled, "--json", "--judge", own).stdout)
    assert data["judge"]["revision"] != judge.revision
    assert data["agreement_binary"] == pytest.approx(1 / 3, abs=1e-6)  # everything complies


@pytest.mark.parametrize("name", ["other", "missing.json", ""])
def test_an_unknown_judge_is_an_error(labelled: Path, name: str) -> None:
    done = run(labelled, "--judge", name)
    assert done.exit_code == 1
    assert "--judge must be refusal or a file with weights" in done.output


def test_faulty_rows_are_named(labelled: Path) -> None:
    labelled.write_text(labelled.read_text() + '{"prompt": "q", "completion": "a", "human_label": "maybe"}\n{\n')
    done = run(labelled, "--json")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert f"{labelled}, row 5: human_label" in done.stderr
    assert f"{labelled}, row 6: the line must be JSON" in done.stderr


def test_as_a_process_without_torch(labelled: Path) -> None:
    """Nothing but one JSON object on standard output; no torch, no network."""
    code = (
        "import socket, sys\nsys.modules['torch'] = sys.modules['inspect_ai'] = None\n"
        "socket.socket.connect = None\n"
        "from axolotl_mote.cli import main\nmain(['judge', sys.argv[1], '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(labelled)], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 3


def test_help_has_an_example() -> None:
    assert "judge labelled.jsonl --judge refusal --json" in run("--help").output
