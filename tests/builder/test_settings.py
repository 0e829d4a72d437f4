"""The build file: schema, errors, and which keys make another build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from axolotl_mote.builder.settings import Settings, changes, config_hash, identity, load_settings
from axolotl_mote.files import folder_digest

HASHES = dict.fromkeys(("response", "analysis", "guidance", "check"), "0")


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "b.yml"
    path.write_text("output: o\nquestions: []\nmodels: {default: {type: local, path: m, bach: 2}}\nchian: full\n")
    with pytest.raises(ValueError, match=r"(?s)questions.*models\.default.*bach.*chian"):
        load_settings(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"check": False}, "check must be true when chain is adaptive"),
        ({"stages": {"check": {"model": "guard"}}}, r"stages\.check\.model must be a name under models \(default\)"),
        ({"stages": {"check": {"constrained": True}}}, "constrained must go with a local model"),
        ({"budget": {"request": 3}}, "request"),
        (
            {"budget": {"requests": 3}, "models": {"default": {"type": "local", "path": "m", "batch_size": 4}}},
            r"budget\.requests must be at least models\.default\.batch_size \(4\); got 3",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    make_settings: Callable[..., Settings], keys: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(**keys)


@pytest.mark.parametrize(
    "keys",
    [{"budget": {"tokens": 5}}, {"deduplicate": None}, {"count": 3}, {"server": {"timeout": 1}}, {"url": "http://x"}],
)
def test_keys_that_do_not_change_texts_keep_the_hash(
    make_settings: Callable[..., Settings], keys: dict[str, object]
) -> None:
    assert config_hash(identity(make_settings(**keys), HASHES)) == config_hash(identity(make_settings(), HASHES))


def test_keys_that_change_texts_change_the_hash_and_are_named(make_settings: Callable[..., Settings]) -> None:
    old = identity(make_settings(), HASHES)
    new = identity(make_settings(seed=7, stages={"check": {"temperature": 0.5}}), {**HASHES, "check": "1"})
    assert config_hash(old) != config_hash(new)
    assert changes(old, new) == ["seed: 42 -> 7", "stages.check.prompt: 0 -> 1", "stages.check.temperature: 0.0 -> 0.5"]


def test_stages_out_of_reach_are_no_part_of_the_hash(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(chain="guidance", check=False, stages={"check": {"model": "nowhere"}})
    assert settings.active_stages() == ("response", "guidance")


def test_a_model_folder_is_told_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = folder_digest(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert folder_digest(tmp_path) != before


@pytest.mark.parametrize("place", [0.0, 0.37, 1.0])
def test_other_weights_of_the_same_size_are_another_model(tmp_path: Path, place: float) -> None:
    """A fine-tune differs in nearly every byte; here a sixteenth of the file does, wherever it is."""
    path, size = tmp_path / "model.safetensors", 17 * 2**20
    path.write_bytes(bytes(size))
    before = folder_digest(tmp_path)
    with path.open("r+b") as file:
        file.seek(int(place * (size - size // 15)))
        file.write(b"\1" * (size // 15))
    assert folder_digest(tmp_path) != before


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("example_configs/build_*.yml")), ids=lambda p: p.name
)
def test_example_configs_follow_the_schema(path: Path) -> None:
    load_settings(path)
