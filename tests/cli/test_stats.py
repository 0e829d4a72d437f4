"""``axolotl mote stats`` as a user runs it."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
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


def test_memory_does_not_hold_the_rows(chains: Path) -> None:
    """10 MiB of chains and as much of rejected rows; the texts that count are short."""
    run(chains, "--json")  # imports
    other = {"id": "x" * 10_000}
    chains.write_text("".join(json.dumps({"response": f"word{n % 9}", **other}) + "\n" for n in range(1000)))
    chains.with_name("rejected.jsonl").write_text((json.dumps({"reason": "unsafe", **other}) + "\n") * 1000)
    tracemalloc.start()
    try:
        done = run(chains, "--json")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert json.loads(done.output)["rejected"] == {"unsafe": 1000}
    assert peak < 3 * 2**20


def test_chains_from_a_pipe(chains: Path) -> None:
    """As with the shell's ``<(zcat chains.jsonl.gz)``: it can be read once."""
    pipe = chains.with_name("pipe")
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(chains.read_bytes(),), daemon=True)
    writer.start()
    assert json.loads(run(pipe, "--json").output)["chains"] == 2


def test_html(chains: Path, tmp_path: Path) -> None:
    done = run(chains, "--html", tmp_path / "s.html")
    assert done.exit_code == 0, done.output
    assert "<svg" in (tmp_path / "s.html").read_text()


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    """What `axolotl mote generate` writes with steps of one's own: an answer, one cut off before it, one refused."""
    rows = [
        {"plan": "First the dough.", "draft": None, "answer": "Knead it.", "finished": True, "error": None},
        {"plan": "First the", "draft": None, "answer": None, "finished": False, "error": None},
        {"plan": None, "draft": None, "answer": None, "finished": False, "error": "takes 900 positions"},
    ]
    path = tmp_path / "generated.jsonl"
    path.write_text("".join(json.dumps({"messages": [], "check": None, **row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("options", [["--steps", "plan,draft,answer"], ["--steps", "plan", "--steps", "draft, answer"]])
def test_steps_of_ones_own_and_refused_rows(generated: Path, options: list[str]) -> None:
    data = json.loads(run(generated, "--json", *options).output)
    assert (data["chains"], data["refused"]) == (2, 1)
    assert {step: numbers["count"] for step, numbers in data["steps"].items()} == {
        "plan": 2,
        "draft": 0,
        "answer": 1,
        "chain": 2,
    }
    assert data["forms"] == {"plan": 1, "plan+answer": 1}
    shown = run(generated, *options, "--html", generated.with_suffix(".html"))
    assert shown.exit_code == 0, shown.output
    assert "2 chains, 1 refused row left out" in shown.output
    assert "in the paper" not in shown.output
    assert "1 refused row left out" in generated.with_suffix(".html").read_text()


@pytest.mark.parametrize(
    ("steps", "message"),
    [("plan,Answer", "lower-case"), ("plan,plan", "repeat"), ("plan,", "lower-case")],
)
def test_wrong_steps_are_refused(generated: Path, steps: str, message: str) -> None:
    done = run(generated, "--steps", steps)
    assert done.exit_code == 1
    assert message in done.output


def test_chains_of_other_steps_point_to_the_option(generated: Path) -> None:
    generated.write_text('{"messages": [], "plan": "One.", "answer": "Two."}\n')
    done = run(generated)
    assert done.exit_code == 1
    assert "row 1: response must be a string; got NoneType." in done.output
    assert "--steps" in done.output


def test_a_file_of_refused_rows_alone_says_so(generated: Path) -> None:
    generated.write_text('{"messages": [], "response": null, "error": "too long"}\n')
    assert "got 1 refused rows and no chain" in run(generated).output


def test_a_wrong_file_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"response": "x"}\nnot json\n')
    done = run(path)
    assert done.exit_code == 1
    assert "row 2: the line must be JSON" in done.output
    assert run("--help").output.count("axolotl mote stats outputs/selfalign/data/chains.jsonl") == 1


def test_the_shipped_chains_can_be_described(seed_chains: Path) -> None:
    data = json.loads(run(seed_chains, "--json").output)
    assert data["chains"] == 26


@pytest.mark.parametrize("messages", ['["x"]', '"oops"', '{"role": "user"}', "null"])
def test_odd_messages_are_counted_as_no_user_turn(tmp_path: Path, messages: str) -> None:
    path = tmp_path / "chains.jsonl"
    path.write_text(f'{{"response": "a", "messages": {messages}}}\n')
    result = CliRunner().invoke(command, [str(path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["turns"] == {"0": 1}


def test_the_page_never_replaces_a_file_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "chains.jsonl"
    path.write_text('{"response": "a"}\n')
    result = CliRunner().invoke(command, [str(path), "--html", str(path)])
    assert result.exit_code == 1
    assert "--html must not name a file that is read" in result.output
    assert path.read_text() == '{"response": "a"}\n'
