"""The two ways to call the commands, and how long ``--help`` takes to import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from kit import save_adapter, tiny_model, tiny_mote

from axolotl_mote.cli import main

BIN = Path(sys.executable).parent


@pytest.mark.parametrize("name", ["axolotl-mote", "axolotl mote"])
def test_usage_names_the_program_as_it_was_called(name):
    for arguments, usage in ((["--help"], f"Usage: {name} [OPTIONS]"), (["chat", "--help"], f"Usage: {name} chat")):
        shown = CliRunner().invoke(main, arguments, prog_name=name)
        assert shown.exit_code == 0, shown.output
        assert shown.output.startswith(usage)
        assert set(re.findall("(axolotl.mote) ", shown.output)) == {name}


@pytest.mark.parametrize("command", sorted(main.list_commands(None)))
def test_every_help_holds_an_example(command):
    assert f"axolotl mote {command} " in CliRunner().invoke(main, [command, "--help"], prog_name="axolotl mote").output


def test_help_imports_nothing_heavy():
    """click is all that the list of commands needs; the rest of this package is light (tests/test_layering.py)."""
    code = "import sys; from axolotl_mote.cli import main; main(['--help'], standalone_mode=False)"
    code += "; print('loaded', sorted({'torch', 'transformers', 'peft', 'rich', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded []\n")


@pytest.mark.parametrize("moment", ["check_questions", "read_questions", "summarize_answers"])
def test_interrupting_generate_at_any_moment_exits_130(folder, tmp_path, monkeypatch, moment):
    """While questions load, while answers are generated, while the summary is written."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"axolotl_mote.generation.answers.{moment}", interrupt)
    (tmp_path / "q.jsonl").write_text('{"prompt": "?"}\n')
    files = ["--input", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "8"]
    result = CliRunner().invoke(main, ["generate", "--adapter", str(folder / "adapter"), *files])
    assert result.exit_code == 130, result.output
    assert "Traceback" not in result.output
    assert "run the same command again to continue" in result.stderr


@pytest.mark.parametrize("name", ["build", "stats", "chat", "export"])
def test_interrupting_any_command_exits_130(monkeypatch, name):
    @click.command()
    def command():
        raise KeyboardInterrupt

    monkeypatch.setattr(f"axolotl_mote.cli.{name}.command", command)
    result = CliRunner().invoke(main, [name])
    assert (result.exit_code, result.stdout) == (130, "")


# --- --json -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an adapter on it, questions and a chain."""
    path = tmp_path_factory.mktemp("json")
    model, tokenizer = tiny_mote()
    tiny_model().save_pretrained(path / "base")
    save_adapter(model, tokenizer, path / "adapter", path / "base")
    (path / "questions.jsonl").write_text('{"prompt": "?"}\n')
    row = {"messages": [{"role": "user", "content": "hi"}], "analysis": "a", "guidance": None, "response": "hello"}
    (path / "chains.jsonl").write_text(json.dumps(row) + "\n")
    labelled = {"prompt": "Why?", "completion": "Because.", "human_label": "full_compliance"}
    (path / "mote.yml").write_text("adapter: mote\n")
    (path / "labelled.jsonl").write_text(json.dumps(labelled) + "\n")
    return path


_WITH_JSON = {
    "stats": ["{0}/chains.jsonl"],
    "generate": ["--adapter", "{0}/adapter", "--input", "{0}/questions.jsonl", "--output", "{1}/out.jsonl"],
    "chat": ["--adapter", "{0}/adapter", "--max-new-tokens", "8"],
    "export": ["--adapter", "{0}/adapter", "--output", "{1}/exported", "--no-verify"],
    "judge": ["{0}/labelled.jsonl"],
    "doctor": ["{0}/mote.yml", "--only", "versions"],
}

_TESTED_ELSEWHERE = {"eval"}  # tests/evaluation/test_eval_run.py: it needs inspect_ai

_LOUD = """
import logging, os, warnings
import axolotl.cli  # logs to standard output
from axolotl_mote.builder.output import statistics
from axolotl_mote.cli import main
summarize = statistics.summarize
def loud(*args, **options):
    print("printed by a library")
    os.write(1, b"written below Python\\n")
    os.system("echo by a child")
    logging.getLogger("transformers").warning("logged")
    warnings.warn("warned")
    return summarize(*args, **options)
statistics.summarize = loud
main()
"""


def test_every_command_with_json_is_tested():
    commands = {name: main.get_command(None, name) for name in main.list_commands(None)}
    has_json = {name for name, command in commands.items() if any("--json" in p.opts for p in command.params)}
    assert has_json == set(_WITH_JSON) | _TESTED_ELSEWHERE


def piped(*args: str | Path, text: str = "hello\n") -> subprocess.CompletedProcess[str]:
    """Run a command with pipes, as a shell does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, args)), input=text, capture_output=True, text=True, env=environment, timeout=180, check=False
    )


@pytest.mark.parametrize("name", _WITH_JSON)
def test_json_is_all_that_is_printed(folder, tmp_path, name):
    arguments = [argument.format(folder, tmp_path) for argument in _WITH_JSON[name]]
    done = piped(BIN / "axolotl-mote", name, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    assert done.stdout.count("\n") == 1
    assert "axolotl-mote" not in done.stderr


def test_what_libraries_print_goes_to_standard_error(folder):
    pytest.importorskip("axolotl")
    done = piped(sys.executable, "-c", _LOUD, "stats", folder / "chains.jsonl", "--json")
    assert json.loads(done.stdout)["chains"] == 1, done.stderr
    for line in ("printed by a library", "written below Python", "by a child", "logged", "warned"):
        assert line in done.stderr


def test_below_axolotl_only_its_banner_stands_above_the_json(folder):
    art = pytest.importorskip("axolotl.cli.art")
    done = piped(BIN / "axolotl", "mote", "stats", folder / "chains.jsonl", "--json")
    above, _, line = done.stdout.rstrip().rpartition("\n")
    assert above.strip() == art.AXOLOTL_LOGO.strip()
    assert json.loads(line)["chains"] == 1
    assert "Call `axolotl-mote` to get JSON alone" in done.stderr
