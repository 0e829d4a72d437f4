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


@pytest.mark.parametrize(
    "given",
    [
        ["--lora-modules", "a=x", "b=y", "-tp", "1"],
        ["--lora-modules=a=x", "--port", "9", "--lora_modules", "b=y", "-tp", "1"],
        ["--lora-modules", "a=x", "--port", "9", "--lora-modules", "b=y", "-tp", "1"],
    ],
)
def test_adapters_are_found_however_they_are_written(folder, given):
    arguments = serve_arguments(folder, "mote", given)
    begin = arguments.index("--lora-modules") + 1
    assert arguments[begin : begin + 3] == [f"mote={folder}/adapter", "a=x", "b=y"]
    assert values(arguments, "--max-loras") == ["4"]
    assert arguments[-2:] == ["-tp", "1"]
    assert sum(argument.startswith("--lora-modules") for argument in arguments) == 1


def test_formats_hold_whatever_else_is_said_of_them(folder):
    flag = "--structured-outputs-config"
    on = [f"{flag}.enable_in_reasoning", "true"]
    for given, expected in [
        ([], on),
        ([f"{flag}.backend", "xgrammar"], [*on, f"{flag}.backend", "xgrammar"]),
        (["--structured_outputs_config.backend=xgrammar"], [*on, f"{flag}.backend=xgrammar"]),
        ([flag, '{"backend": "xgrammar"}'], [flag, '{"enable_in_reasoning": true, "backend": "xgrammar"}']),
        ([f'{flag}={{"enable_in_reasoning": false}}'], [flag, '{"enable_in_reasoning": false}']),
        ([f"{flag}.enable_in_reasoning=false"], [f"{flag}.enable_in_reasoning=false"]),
    ]:
        found = serve_arguments(folder, "mote", given)
        assert found[found.index("base") + 1 :] == expected
    for wrong in ("{", "[]", "5"):
        with pytest.raises(ValueError, match=f"{flag} must be a JSON object"):
            serve_arguments(folder, "mote", [flag, wrong])


def test_a_file_of_flags_is_read_as_flags(folder, tmp_path):
    file = tmp_path / "flags.yml"
    file.write_text("served-model-name: mine\nmax_lora_rank: 256\nport: 9\n")
    arguments = serve_arguments(folder, "mote", ["--config", str(file)])
    assert "--served-model-name" not in arguments  # the command line would win over the file
    assert "--max-lora-rank" not in arguments
    assert values(arguments, "--max-loras") == ["2"]
    for text, message in [
        ("tokenizer: other", "--tokenizer must be left to"),
        ("lora-modules: [a=x]", "--lora-modules must stand on the command line"),
        ("structured-outputs-config.enable_in_reasoning: false", "--structured-outputs-config must stand on the"),
        ("served-model-name: mote", "--name must be a name that the base does not have"),
        ("served_model_name: [x, mote]", "--name must be a name that the base does not have"),
        ("a: [", "--config must be a YAML file"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            serve_arguments(folder, "mote", ["--config", str(file)])
    with pytest.raises(ValueError, match="--config must be a YAML file; got none"):
        serve_arguments(folder, "mote", ["--config=none"])


@pytest.mark.parametrize("flag", ["--logits-proc", "--no-enable-lor", "--lora-mod", "--max-lora", "--tok", "--str"])
def test_the_beginning_of_a_flag_is_refused(folder, flag):
    with pytest.raises(ValueError, match=f"^{flag} must be written out; got the beginning of {flag}"):
        serve_arguments(folder, "mote", [f"{flag}=x"])


@pytest.mark.parametrize("name", ["", "base", "mine", "also"])
def test_a_name_that_the_base_has_is_refused(folder, name):
    given = [] if name in ("", "base") else ["--served-model-name", "mine", "also"]
    with pytest.raises(ValueError, match="--name must be a name that the base does not have"):
        serve_arguments(folder, name, given)


def test_commas_and_equals_signs_reach_vllm_as_json(folder, tmp_path):
    odd = tmp_path / "a, b=c"
    shutil.copytree(folder, odd)
    for place, name in [(odd, "mote"), (folder, "a=b"), (folder, "a,b")]:
        arguments = serve_arguments(place, name)
        module = json.loads(arguments[arguments.index("--lora-modules") + 1])
        assert module == {"name": name, "path": str(place / "adapter")}


def test_two_dashes_end_nothing(folder):
    assert serve_arguments(folder, "mote", ["--", "--port", "9"]) == serve_arguments(folder, "mote", ["--port", "9"])


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
        ([str(tmp_path)], "DIR must be a folder that `axolotl-mote export --format vllm` wrote"),
        ([str(folder), "--reasoning-parser", "qwen3"], "--reasoning-parser must be left to `axolotl-mote serve`"),
        ([str(folder), "--no-enable-lora"], "--no-enable-lora must be left to"),
        ([str(folder), "--chat-template", "x.jinja"], "--chat-template must be left to"),
        ([str(folder), "--name", "x"], "--name must stand before DIR"),
        ([str(broken)], "must give the markers the ids of the adapter|must know"),
        ([str(other)], "tokenizer must give the markers the ids of the adapter"),
    ]:
        done = CliRunner().invoke(command, ["--dry-run", *arguments])
        assert done.exit_code == 1, (arguments, done.output)
        assert any(part in done.output for part in message.split("|")), done.output
