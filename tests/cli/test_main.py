"""The two ways to call the commands, and how long ``--help`` takes to import."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from axolotl_mote.cli import main


@pytest.mark.parametrize("name", ["axolotl-mote", "axolotl mote"])
def test_usage_names_the_program_as_it_was_called(name):
    for arguments, usage in ((["--help"], f"Usage: {name} [OPTIONS]"), (["chat", "--help"], f"Usage: {name} chat")):
        shown = CliRunner().invoke(main, arguments, prog_name=name)
        assert shown.exit_code == 0, shown.output
        assert shown.output.startswith(usage)
        assert set(re.findall("axolotl.mote", shown.output)) == {name}


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
