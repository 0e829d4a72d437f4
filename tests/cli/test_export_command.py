"""``axolotl mote export``: the printed comparison."""

from __future__ import annotations

import json
import resource

import pytest
from click.testing import CliRunner
from kit import save_adapter, tiny_model, tiny_mote

from axolotl_mote.cli.export import command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("export")
    model, tokenizer = tiny_mote(r=3)
    tiny_model().save_pretrained(path / "base")
    return save_adapter(model, tokenizer, path / "adapter", path / "base")


def test_prints_the_largest_difference(folder, tmp_path):
    result = CliRunner().invoke(command, ["--adapter", str(folder), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "largest difference from the step-routed model" in result.output
    assert "padded" in result.output
    assert (tmp_path / "out/adapters/analysis/adapter_model.safetensors").exists()


def test_json_on_chains_of_ones_own(folder, tmp_path):
    probe = tmp_path / "chains.jsonl"
    row = {"messages": [{"role": "user", "content": "hi"}], "analysis": "a", "guidance": None, "response": "hello"}
    probe.write_text(json.dumps(row) + "\n")
    arguments = ["--adapter", str(folder), "--output", str(tmp_path / "out"), "--probe", str(probe), "--json"]
    result = CliRunner().invoke(command, [*arguments, "--merge-shared"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["largest_difference"] < 1e-4
    assert report["adapters"]["guidance"]["difference"] is None
    assert report["adapters"]["response"]["tokens"] == 7
    assert report == json.loads((tmp_path / "out/export.json").read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "at least one chain"),
        ('{"response": "x"}\n', "row 1: messages must be"),
        ('{"response": "x"}\n{', "row 2: the line must be"),
        ("\n{", "row 2: the line must be"),
    ],
)
def test_wrong_probes_are_refused(folder, tmp_path, text, message):
    probe = tmp_path / "chains.jsonl"
    probe.write_text(text)
    result = CliRunner().invoke(
        command, ["--adapter", str(folder), "--output", str(tmp_path / "out"), "--probe", str(probe)]
    )
    assert result.exit_code == 1
    assert message in result.output


def test_refusals_are_one_line(folder, tmp_path):
    for arguments, message in [
        (["--adapter", str(tmp_path), "--output", str(tmp_path / "out")], "adapter_config.json"),
        (["--adapter", str(folder), "--output", str(tmp_path)], "must not exist yet"),
    ]:
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 1
        assert message in result.output


@pytest.mark.parametrize("size", [100, 60_000])
def test_a_full_disk_is_named_and_leaves_nothing(folder, tmp_path, size):
    """The operating system lets no file grow beyond so many bytes: the tokenizer, or the weights, do not fit."""
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        result = CliRunner().invoke(command, ["--adapter", str(folder), "--output", str(out), "--no-verify"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "output must be writable; got" in result.stderr
    assert str(out) in result.stderr
    assert list(tmp_path.iterdir()) == []
