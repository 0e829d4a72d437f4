"""``load_mote``: adapters that are broken, torn or of another base model; plain LoRAs that were trained on chains."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from kit import LINEARS, STEPS, plain_lora, save_adapter, tiny_model, tiny_mote, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.cli import main
from axolotl_mote.export import export_adapter
from axolotl_mote.generation import codec_for, generate_chain, load_mote

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a base model, a MoTE adapter on it, and a base model of another size."""
    path = tmp_path_factory.mktemp("loading")
    model, tokenizer = tiny_mote()
    tiny_model().save_pretrained(path / "base")
    tiny_model(hidden=64).save_pretrained(path / "wider")
    tiny_model(layers=1).save_pretrained(path / "shorter")
    save_adapter(model, tokenizer, path / "adapter", path / "base")
    return path


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps(config))


def drop_tensors(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, folder / WEIGHTS, metadata={"format": "pt"})


def change_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS, metadata={"format": "pt"})


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def pickle_instead(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


BROKEN = {
    "no configuration": (lambda f: (f / CONFIG).unlink(), "must be a folder with adapter_config.json; got none at"),
    "torn configuration": (
        lambda f: (f / CONFIG).write_text('{"peft_type": "MO'),
        "adapter_config.json must hold a JSON",
    ),
    "empty configuration": (lambda f: (f / CONFIG).write_text(""), "adapter_config.json must hold a JSON object"),
    "configuration in Latin-1": (lambda f: (f / CONFIG).write_bytes(b'{"a": "\xe9"}'), "must hold a JSON object"),
    "nested configuration": (lambda f: (f / CONFIG).write_text("[" * 10**5), "adapter_config.json must hold a JSON"),
    "a list as configuration": (lambda f: (f / CONFIG).write_text("[]"), "must hold a JSON object; got list"),
    "another type": (lambda f: change_config(f, peft_type="IA3"), "must have peft_type MOTE.*; got IA3 at"),
    "no markers": (lambda f: change_config(f, marker_ids=[]), r"marker_ids must hold .*; got \[\] at"),
    "words as markers": (lambda f: change_config(f, marker_ids=list("abcdef")), "marker_ids must be a valid integer"),
    "wrong steps": (lambda f: change_config(f, steps=["a b"], markers=[]), "adapter_config.json: mote.steps must hold"),
    "a word as weight": (
        lambda f: change_config(f, expert_weight="much"),
        "adapter_config.json: expert_weight must be a valid number; got 'much'",
    ),
    "a word as a number": (
        lambda f: change_config(f, lora_alpha="8"),
        "adapter_config.json: lora_alpha must be a valid integer; got '8'",
    ),
    "no layers": (lambda f: change_config(f, target_modules=None), "target_modules must name layers; got None at"),
    "a number as layers": (
        lambda f: change_config(f, target_modules=5),
        "target_modules must be a valid array or must be a valid string; got 5",
    ),
    "a number as base model": (
        lambda f: change_config(f, base_model_name_or_path=5),
        "base_model_name_or_path must be a valid string; got 5",
    ),
    "a string as steps": (lambda f: change_config(f, steps="analysis"), "steps must be a valid array; got 'analysis'"),
    "a null as steps": (lambda f: change_config(f, steps=None), "steps must be a valid array; got None"),
    "a list as type": (
        lambda f: change_config(f, peft_type=["MOTE"]),
        r"must have peft_type MOTE or LORA; got \['MOTE",
    ),
    "no rank": (lambda f: change_config(f, r=0), "adapter_config.json: r must be greater than or equal to 1; got 0"),
    "a negative rank": (
        lambda f: change_config(f, r=-4),
        "adapter_config.json: r must be greater than or equal to 1; got -4",
    ),
    "a huge rank": (
        lambda f: change_config(f, r=10**9),
        r"lora_A.weight must have shape \(4000000000, \.\.\.\) .*; got \(16, ",
    ),
    "a number as flag": (lambda f: change_config(f, use_dora="no"), "use_dora must be a valid boolean; got 'no'"),
    "an impossible dropout": (
        lambda f: change_config(f, lora_dropout=5.0),
        r"lora_dropout must be less than 1; got 5.0",
    ),
    "a marker twice": (
        lambda f: change_config(f, marker_ids=[259, 259, 260, 261, 262, 263, 264]),
        "marker_ids must hold 6 different ids",
    ),
    "a negative marker": (
        lambda f: change_config(f, marker_ids=[-1, 1, 2, 3, 4, 5]),
        "marker_ids must hold 6 different",
    ),
    "a flat tensor": (
        lambda f: change_tensors(f, {f"{LAYER}.lora_A.weight": torch.zeros(7)}),
        r"q_proj.lora_A.weight must have shape \(16, .*; got \(7,\)",
    ),
    "a tensor of an unknown layer": (
        lambda f: change_tensors(f, {f"{LAYER}7.lora_A.weight": torch.zeros(7)}),
        r"q_proj7.lora_A.weight must have shape \(16, .*; got \(7,\)",
    ),
    "flat marker rows": (
        lambda f: change_tensors(f, {"base_model.model.model.embed_tokens.lora_marker_rows.weight": torch.zeros(6)}),
        r"lora_marker_rows.weight must have shape \(6, .*; got \(6,\)",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "must hold adapter_model.safetensors; got none at"),
    "a pickle": (pickle_instead, "must hold adapter_model.safetensors; got adapter_model.bin at .* can run code"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "adapter_model.safetensors must be whole; got .* at"),
    "torn weights": (lambda f: tear(f / WEIGHTS), "adapter_model.safetensors must be whole; got .* at"),
    "half of the tensors": (drop_tensors, "layers.1"),
    "torn tokenizer": (lambda f: tear(f / "tokenizer.json"), "tokenizer files must be whole; got .* at"),
    "no base model": (lambda f: change_config(f, base_model_name_or_path=None), "base_model must be given; got none"),
    "a base model that is gone": (
        lambda f: change_config(f, base_model_name_or_path=str(f / "gone")),
        "base_model must be a folder or a hub name; got .*gone",
    ),
}


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained / "adapter", tmp_path / "adapter")


def refusals(adapter: Path, tmp_path: Path, *options: str) -> dict[str, str]:
    """What each way to load an adapter says, on one line."""
    (tmp_path / "q.jsonl").write_text('{"prompt": "?"}\n')
    arguments = {
        "generate": ["--input", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "out.jsonl")],
        "chat": [],
        "export": ["--output", str(tmp_path / "exported")],
        "export --no-verify": ["--output", str(tmp_path / "exported"), "--no-verify"],
    }
    said = {}
    for name, more in arguments.items():
        result = CliRunner().invoke(main, [name.split()[0], "--adapter", str(adapter), *more, *options], input="hi\n")
        assert result.exit_code == 1, (name, result.output, result.exception)
        assert isinstance(result.exception, SystemExit), (name, result.exception)
        said[name] = result.stderr
    with pytest.raises(ValueError) as refused:  # noqa: PT011  (the caller matches the message)
        load_mote(adapter, options[1] if options else None)
    assert not list(tmp_path.glob(".exported*"))
    return said | {"load_mote": str(refused.value)}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_adapters_are_refused_in_one_line(adapter, tmp_path, fault):
    """By whatever way they are loaded, with the file's name."""
    damage, message = BROKEN[fault]
    damage(adapter)
    for way, said in refusals(adapter, tmp_path).items():
        (line,) = [line for line in said.splitlines() if line.strip() and "it/s" not in line]
        assert re.search(message, line), (way, line)
        assert str(adapter) in line, way


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("wider", r"_proj has in_features \d+ in the adapter and \d+ in the base model, and 13 more layers differ"),
        ("shorter", "has in_features .* no such layer in the base model, and 6 more layers differ"),
    ],
)
def test_an_adapter_of_another_base_model_is_refused_in_one_line(trained, adapter, tmp_path, base, message):
    for way, said in refusals(adapter, tmp_path, "--base-model", str(trained / base)).items():
        (line,) = [line for line in said.splitlines() if line.strip() and "it/s" not in line]
        assert re.search(message, line), (way, line)
        for name in (adapter, trained / "base", trained / base):  # the adapter, its own base model, this one
            assert str(name) in line, way


def test_a_torn_base_model_is_named(trained, adapter, tmp_path):
    base = shutil.copytree(trained / "base", tmp_path / "base")
    tear(base / "model.safetensors")
    for said in refusals(adapter, tmp_path, "--base-model", str(base)).values():
        assert "base_model must be whole" in said
        assert str(base) in said


# --- plain LoRAs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_plain_lora_trained_on_chains_loads(tmp_path, tied):
    """Its logits are those of the trained model, the rows of its markers included."""
    folder, trained = plain_lora(tmp_path, tied)
    model, tokenizer = load_mote(folder)
    ids = codec_for(model, tokenizer).encode_question(QUESTION)
    ids = torch.tensor([[*ids, *codec_for(model, tokenizer).vocabulary.marker_ids]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trained(ids).logits)
    for steps in ("adaptive", list(STEPS), "verify"):
        assert generate_chain(model, tokenizer, QUESTION, steps, max_new_tokens=30).valid


def test_the_steps_of_a_plain_lora_are_those_it_was_trained_with(tmp_path):
    """In their order, whatever other markers the tokenizer knows."""
    tokenizer = tiny_tokenizer(("think", "response", "analysis"))
    steps = ("analysis", "response")
    base = tiny_model(len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    ids = ChainCodec(tokenizer, steps).vocabulary.marker_ids
    model = get_peft_model(base, LoraConfig(target_modules=LINEARS, trainable_token_indices={"embed_tokens": ids}))
    folder = save_adapter(model, tokenizer, tmp_path / "lora", tmp_path / "base")
    assert codec_for(*load_mote(folder)).steps == steps


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((), "tokenizer must hold the markers that the LoRA was trained with"),
        (("plan", "draft", "think", "response"), "tokenizer must hold the markers that the LoRA was trained with"),
    ],
)
def test_a_plain_lora_with_another_tokenizer_is_refused(tmp_path, steps, message):
    folder, _ = plain_lora(tmp_path, steps=("analysis", "answer"))
    tokenizer = tiny_tokenizer(steps)
    if steps:  # the trained ids now spell an end and other starts
        change_config(folder, trainable_token_indices={"embed_tokens": [260, 261, 263]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        load_mote(folder)


def test_a_lora_without_markers_is_refused(tmp_path):
    tokenizer = tiny_tokenizer(())
    tiny_model().save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=LINEARS))
    folder = save_adapter(model, tokenizer, tmp_path / "lora", tmp_path / "base")
    with pytest.raises(ValueError, match="must hold step markers"):
        load_mote(folder)


def test_generate_writes_the_same_columns_for_a_plain_lora(trained, tmp_path):
    folder, _ = plain_lora(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"prompt": "?"}\n')
    written = []
    for adapter in (folder, trained / "adapter"):
        files = ["--input", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / f"{adapter.name}.jsonl")]
        result = CliRunner().invoke(
            main, ["generate", "--adapter", str(adapter), *files, "--steps", "all", "--max-new-tokens", "30"]
        )
        assert result.exit_code == 0, result.output
        rows = [json.loads(line) for line in (tmp_path / f"{adapter.name}.jsonl").read_text().splitlines()]
        written.append([(row["mode"], list(row), row["valid"]) for row in rows])
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_alpha": "8"}, "lora_alpha must be a valid integer; got '8'"),
        ({"r": 0}, "r must be greater than or equal to 1; got 0"),
        ({"target_modules": None}, "target_modules must name layers; got None at"),
        ({"trainable_token_indices": 5}, "trainable_token_indices must be a valid array or must be an object; got 5"),
        ({"base_model_name_or_path": ["a"]}, r"base_model_name_or_path must be a valid string; got \['a'\]"),
    ],
)
def test_a_plain_lora_with_wrong_values_is_refused(tmp_path, values, message):
    folder, _ = plain_lora(tmp_path)
    change_config(folder, **values)
    with pytest.raises(ValueError, match=message) as refused:
        load_mote(folder)
    assert str(folder / CONFIG) in str(refused.value)


def test_a_plain_lora_is_not_exported(tmp_path):
    folder, _ = plain_lora(tmp_path)
    with pytest.raises(ValueError, match="adapter must have peft_type MOTE; got LORA at"):
        export_adapter(folder, tmp_path / "exported")


def test_a_codec_is_kept_between_answers_until_the_tokenizer_changes() -> None:
    model, tokenizer = tiny_mote()
    kept = codec_for(model, tokenizer)
    assert codec_for(model, tokenizer) is kept
    tokenizer.chat_template += " "
    assert codec_for(model, tokenizer) is not kept
