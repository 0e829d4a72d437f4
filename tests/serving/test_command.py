"""``axolotl mote serve``: the command that it runs, and what it refuses."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
from click.testing import CliRunner
from kit import save_adapter, tiny_model, tiny_mote, tiny_tokenizer

from axolotl_mote.cli.serve import command
from axolotl_mote.export import export_served
from axolotl_mote.serving.command import serve_arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    model, tokenizer = tiny_mote(r=5)
    tiny_model().save_pretrained(path / "base")
    export_served(save_adapter(model, tokenizer, path / "adapter", path / "base"), path / "out", verify=False)
    return path / "out"


def values(arguments, flag):
    begin = arguments.index(flag) + 1
    return arguments[begin : next((n for n in range(begin, len(arguments)) if arguments[n].startswith("--")), None)]


def test_sizes_come_from_the_adapter_and_flags_are_passed_on(folder):
    arguments = serve_arguments(folder, "mote", ["--port", "8001", "--max-loras", "9"])
    assert arguments[0] == str(folder / "base")
    assert values(arguments, "--lora-modules") == [f"mote={folder}/adapter"]
    assert values(arguments, "--max-lora-rank") == ["32"]  # of 4 * 5 = 20
    assert values(arguments, "--max-loras") == ["9"]
    assert values(arguments, "--max-cpu-loras") == ["2"]
    assert values(arguments, "--port") == ["8001"]


def test_further_adapters_are_served_beside_it(folder):
    arguments = serve_arguments(folder, "mote", ["--lora-modules", "a=x", "b=y", "--port", "1"])
    assert values(arguments, "--lora-modules") == [f"mote={folder}/adapter", "a=x", "b=y"]
    assert values(arguments, "--max-loras") == ["4"]
    assert arguments.count("--lora-modules") == 1


def test_dry_run_prints_what_would_run(folder):
    done = CliRunner().invoke(command, ["--dry-run", "--name", "aligned", str(folder), "--port", "8001"])
    assert done.exit_code == 0, done.output
    assert shlex.split(done.output) == [
        "vllm",
        "serve",
        *serve_arguments(folder.resolve(), "aligned", ["--port", "8001"]),
    ]


def test_refusals_are_one_line_with_the_way_out(folder, tmp_path):
    broken = tmp_path / "renamed"
    shutil.copytree(folder, broken)
    tiny_tokenizer(("analysis", "guidance", "answer")).save_pretrained(broken / "base")
    config = json.loads((broken / "adapter/adapter_config.json").read_text())
    config["marker_ids"] = config["marker_ids"][::-1]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "adapter/adapter_config.json").write_text(json.dumps(config))
    for arguments, message in [
        ([str(tmp_path)], "DIR must be a folder that `axolotl mote export --format vllm` wrote"),
        ([str(folder), "--reasoning-parser", "qwen3"], "--reasoning-parser must be left to `axolotl mote serve`"),
        ([str(folder), "--no-enable-lora"], "--no-enable-lora must be left to"),
        ([str(broken)], "must give the markers the ids of the adapter|must know"),
        ([str(other)], "tokenizer must give the markers the ids of the adapter"),
    ]:
        done = CliRunner().invoke(command, ["--dry-run", *arguments])
        assert done.exit_code == 1, (arguments, done.output)
        assert any(part in done.output for part in message.split("|")), done.output
