"""The evaluation file: what is accepted, what is refused with the way out, and what is part of a cell's hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl_mote.evaluation.settings import (
    NO_STEPS,
    Endpoint,
    Settings,
    System,
    TaskSpec,
    answer_identity,
    endpoint_identity,
    identity_hash,
    load_settings,
)

REPO = Path(__file__).resolve().parent.parent.parent
BASE: dict[str, Any] = {"output": "out", "systems": [{"name": "base", "model": "m"}], "tasks": ["xstest"]}


def settings(**changed: Any) -> Settings:
    return Settings.model_validate({**BASE, **changed})


@pytest.mark.parametrize("name", ["eval.yml", "eval_servers.yml"])
def test_examples_are_valid(name: str) -> None:
    found = load_settings(REPO / "example_configs" / name)
    assert found.systems
    assert found.tasks


def test_a_task_is_a_name_or_a_mapping() -> None:
    found = settings(tasks=["xstest", {"name": "strongreject", "transforms": ["none", "base64"], "limit": 3}])
    assert [task.title for task in found.tasks] == ["xstest", "strongreject"]
    assert found.tasks[1].arguments == {"transforms": ["none", "base64"], "limit": 3}
    assert found.tasks[0].arguments == {}


def test_modes_of_systems() -> None:
    assert System(name="a", adapter=Path("a")).modes == ["adaptive"]
    assert System(name="a", adapter=Path("a"), steps=["verify", "response"]).modes == ["verify", "response"]
    assert System(name="a", model="m").modes == [NO_STEPS]
    assert System(name="a", server="http://x/v1", model="m").label == "m at http://x/v1"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unknown": 1}, "unknown"),
        ({"systems": []}, "systems"),
        ({"systems": [{"name": "a"}]}, "must have one of adapter, model and inspect_model; got none"),
        ({"systems": [{"name": "a", "model": "m", "adapter": "d"}]}, "got adapter and model"),
        ({"systems": [{"name": "a", "server": "http://x", "adapter": "d"}]}, "server must go with model"),
        ({"systems": [{"name": "a", "server": "x:80", "model": "m"}]}, "server must begin with http:// or https://"),
        ({"systems": [{"name": "a", "server": "http://u:p@x/v1", "model": "m"}]}, "must not hold a password"),
        ({"systems": [{"name": "a", "model": "m", "steps": ["adaptive"]}]}, "steps must go with adapter"),
        ({"systems": [{"name": "a", "model": "m", "check": True}]}, "check must go with adapter"),
        ({"systems": [{"name": "a", "model": "m", "base_model": "b"}]}, "base_model must go with adapter"),
        ({"systems": [{"name": "a", "model": "m", "api_key_env": "K"}]}, "api_key_env must go with server"),
        ({"systems": [{"name": "a", "server": "http://x", "model": "m", "api_key_env": "sk-123"}]}, "api_key_env"),
        ({"systems": [{"name": "a", "adapter": "d", "steps": ["verify", "verify"]}]}, "got verify twice"),
        ({"systems": [{"name": "../a", "model": "m"}]}, "name"),
        (
            {"systems": [{"name": "a", "model": "m"}, {"name": "A", "model": "n"}]},
            "systems must have names of their own",
        ),
        ({"tasks": ["xstest", "xstest"]}, "tasks must have names of their own; got xstest twice"),
        ({"tasks": ["nothing"]}, "tasks.0"),
        ({"tasks": ["custom"]}, "path must be given for custom"),
        ({"tasks": [{"name": "xstest", "transforms": ["base64"]}]}, "transforms must go with strongreject or custom"),
        ({"tasks": [{"name": "xstest", "subset": "odd"}]}, "subset"),
        ({"tasks": [{"name": "xstest", "label": "a/b"}]}, "label"),
        ({"epochs": 2}, "epochs must be 1 when sampling.temperature is 0"),
        ({"grader": {"server": "http://x"}}, "must have one of adapter, model and inspect_model"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_what_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = tmp_path / "eval.yml"
    path.write_text(yaml.safe_dump({**BASE, **changed}), encoding="utf-8")
    with pytest.raises(ValueError, match="must follow the schema") as error:
        load_settings(path)
    assert message in str(error.value)


def test_all_faults_at_once(tmp_path: Path) -> None:
    path = tmp_path / "eval.yml"
    path.write_text(yaml.safe_dump({"systems": [{"name": "a"}], "tasks": ["nothing"], "x": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="schema") as error:
        load_settings(path)
    assert all(key in str(error.value) for key in ("output", "systems.0", "tasks.0", "x"))


@pytest.mark.parametrize("text", ["", "- a", "a: [", "\x00", "a: &a [*a, *a"])
def test_files_that_are_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "eval.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="the evaluation file must"):
        load_settings(path)


def test_a_file_of_brackets_alone(tmp_path: Path) -> None:
    """PyYAML has no limit of its own: it ends in a RecursionError."""
    path = tmp_path / "eval.yml"
    path.write_text("[" * 20_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"the evaluation file must be readable YAML; got .*recursion.* Correct"):
        load_settings(path)


# --- identity -------------------------------------------------------------------------------------------------------


def cell_hash(found: Settings, system: int = 0, task: int = 0, sha256: str = "s", mode: str = "adaptive") -> str:
    chosen = found.systems[system]
    data = {"version": 1, "sha256": sha256}
    return identity_hash(answer_identity(found, chosen, mode, found.tasks[task], data, endpoint_identity(chosen)))


@pytest.mark.parametrize(
    "changed",
    [
        {"max_new_tokens": 9},
        {"systems": [{"name": "base", "model": "n"}]},
        {"systems": [{"name": "base", "model": "m", "dtype": "float32"}]},
        {"sampling": {"temperature": 1}},
        {"sampling": {"temperature": 1, "seed": 2}},
        {"sampling": {"temperature": 1}, "epochs": 2},
    ],
)
def test_what_changes_answers_is_part_of_the_hash(changed: dict[str, Any]) -> None:
    assert cell_hash(settings(**changed)) != cell_hash(settings())


@pytest.mark.parametrize(
    "changed",
    [
        {"output": "elsewhere"},
        {"batch_size": 3},
        {"grader": {"model": "g"}},
        {"sampling": {"seed": 5}},  # greedy answers have no seed
        {"tasks": [{"name": "xstest", "judge_chain": True}]},
        {"systems": [{"name": "renamed", "model": "m", "device": "cpu"}]},
    ],
)
def test_what_does_not_is_not(changed: dict[str, Any]) -> None:
    assert cell_hash(settings(**changed)) == cell_hash(settings())


def test_prompts_and_mode_are_part_of_the_hash() -> None:
    found = settings()
    assert cell_hash(found, sha256="t") != cell_hash(found)
    assert cell_hash(found, mode="verify") != cell_hash(found)


def test_a_server_is_known_by_its_model_not_by_its_address() -> None:
    one, two = (Endpoint(server=f"http://{host}/v1", model="m") for host in ("a", "b"))
    assert endpoint_identity(one) == endpoint_identity(two)
    other = Endpoint(server="http://a/v1", model="m", extra_body={"top_k": 1})
    assert endpoint_identity(one) != endpoint_identity(other)


def test_other_weights_in_the_same_folder_are_another_system(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    for folder in (adapter, base):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{base}"}}', encoding="utf-8")
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    (base / "model.safetensors").write_bytes(b"1")
    seen = set()
    for file in (None, adapter / "adapter_model.safetensors", base / "model.safetensors"):
        if file is not None:
            file.write_bytes(b"2")
        seen.add(str(endpoint_identity(Endpoint(adapter=adapter))))
    assert len(seen) == 3


@pytest.mark.parametrize("text", ["", "[]", "{", '{"base_model_name_or_path": 3}'])
def test_a_broken_adapter_is_left_to_loading(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    assert endpoint_identity(Endpoint(adapter=tmp_path))["base_model"] is None


def test_keys_are_named_not_given() -> None:
    server = {"server": "http://x", "model": "m"}
    found = settings(systems=[{"name": "a", **server, "api_key_env": "ONE"}], grader={**server, "api_key_env": "TWO"})
    assert found.key_variables() == ["ONE", "TWO"]
    assert "label" not in TaskSpec(name="xstest", label="a").arguments
