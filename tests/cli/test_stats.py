"""``axolotl mote stats`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from axolotl_mote.cli.stats import command


@pytest.fixture
def chains(tmp_path: Path) -> Path:
    rows = [
        {
            "messages": [{"role": "user", "content": "q"}],
            "analysis": None,
            "guidance": None,
            "response": "one two three",
        },
        {"messages": [], "analysis": "four five", "guidance": "six", "response": "seven eight", "check": "safe"},
    ]
    path = tmp_path / "chains.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])


def test_tables(chains: Path) -> None:
    done = run(chains)
    assert done.exit_code == 0, done.output
    assert "2 chains" in done.output
    assert "whole chain" in done.output
    assert "rejected because" not in done.output


def test_json_counts_the_rejected_file_beside(chains: Path) -> None:
    chains.with_name("rejected.jsonl").write_text('{"reason": "unsafe"}\n')
    data = json.loads(run(chains, "--json").output)
    assert data["steps"]["analysis"]["count"] == 1
    assert data["forms"] == {"analysis+guidance+response": 1, "response": 1}
    assert data["rejected"] == {"unsafe": 1}


def test_html(chains: Path, tmp_path: Path) -> None:
    done = run(chains, "--html", tmp_path / "s.html")
    assert done.exit_code == 0, done.output
    assert "<svg" in (tmp_path / "s.html").read_text()


def test_a_wrong_file_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"response": "x"}\nnot json\n')
    done = run(path)
    assert done.exit_code == 1
    assert "one JSON object a line" in done.output
    assert run("--help").output.count("axolotl mote stats outputs/selfalign/data/chains.jsonl") == 1


def test_the_shipped_chains_can_be_described(seed_chains: Path) -> None:
    data = json.loads(run(seed_chains, "--json").output)
    assert data["chains"] == 26
