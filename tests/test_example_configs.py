"""Every example configuration is valid, and an ablation differs from its base only where it says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl_mote.training.args import MoteArgs, MoteOptions

REPO = Path(__file__).resolve().parent.parent
CONFIGS = REPO / "example_configs"
BASELINES = REPO / "tests/ablations"
TRAINING = sorted(
    file.relative_to(CONFIGS).as_posix()
    for file in CONFIGS.rglob("*.yml")
    if "base_model" in yaml.safe_load(file.read_text(encoding="utf-8"))
)
ABLATIONS = [name for name in TRAINING if name.startswith("ablations/")]
# The settings of the paper with one thing changed each: the keys that may differ from llama3-8b.yml.
BATCH = {"micro_batch_size", "gradient_accumulation_steps"}
OTHER_BASE = {"base_model", "chat_template", "datasets", "special_tokens"}
VARIANTS = {
    "llama3-8b-flash-attention.yml": {"attn_implementation"},
    "llama3-8b-qlora.yml": {"load_in_4bit", *BATCH},
    "wizard-vicuna-7b.yml": {"chat_template_jinja", "sequence_len", *OTHER_BASE},
    "qwen3-8b.yml": OTHER_BASE,
}
OWN_TEMPLATES = [name for name, keys in VARIANTS.items() if "chat_template" in keys]
H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))


def test_all_configs_are_found() -> None:
    assert {"quickstart.yml", "llama3-8b.yml", "multinode/llama3-8b-2nodes.yml", *VARIANTS} <= set(TRAINING)
    assert len(ABLATIONS) == 20


@pytest.mark.parametrize("name", TRAINING)
def test_mote_block_is_valid(name: str) -> None:
    MoteOptions(**load(name)["mote"])


@pytest.mark.parametrize("name", TRAINING)
def test_axolotl_accepts_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("axolotl")
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.chdir(REPO)
    monkeypatch.syspath_prepend(BASELINES)  # a row may name a plugin of the baselines
    cfg = DictDefault(load(name))
    prepare_plugins(cfg)
    valid = validate_config(cfg, capabilities=H100, env_capabilities={"torch_version": "2.13.0"})
    assert valid.adapter == cfg.adapter
    assert valid.datasets[0]["type"] == "axolotl_mote.chain"


@pytest.mark.parametrize("name", TRAINING)
def test_every_key_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """axolotl ignores keys that it does not know."""
    schema = pytest.importorskip("axolotl.utils.schemas.config")
    monkeypatch.syspath_prepend(BASELINES)
    from mixture import MixtureArgs

    known = {*schema.AxolotlInputConfig.model_fields, *MoteArgs.model_fields}
    if any("MixturePlugin" in plugin for plugin in load(name)["plugins"]):
        known |= set(MixtureArgs.model_fields)
    unread = load(name).keys() - known
    assert not unread


@pytest.mark.parametrize("name", TRAINING)
def test_paths_and_launch_command_exist(name: str) -> None:
    text = (CONFIGS / name).read_text(encoding="utf-8")
    assert f"example_configs/{name}" in text.split("base_model:")[0]
    for path in re.findall(r"example_configs/[\w./-]+\.(?:jsonl|json|yml|slurm|sh)\b", text):
        assert (REPO / path).is_file(), f"{name} names {path}, which does not exist"


@pytest.mark.parametrize("name", TRAINING)
def test_data_is_shipped_or_written_by_a_build(name: str) -> None:
    builds = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in CONFIGS.glob("build_*.yml")]
    written = {f"{build['output']}/chains.jsonl" for build in builds}
    header = (CONFIGS / name).read_text(encoding="utf-8").split("base_model:")[0]
    written |= {
        f"{folder}/chains.jsonl"
        for folder in re.findall(r"(?:axolotl mote build|human_answers.py) \S+ --output (\S+)", header)
    }
    for dataset in load(name)["datasets"]:
        assert (REPO / dataset["path"]).is_file() or dataset["path"] in written


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_differs_only_where_meant(name: str) -> None:
    base, changed = load("llama3-8b.yml"), load(name)
    different = {key for key in base.keys() | changed.keys() if base.get(key) != changed.get(key)}
    assert different == VARIANTS[name] | {"output_dir"}


@pytest.mark.parametrize("name", OWN_TEMPLATES)
def test_own_chat_template_suits_chains(name: str, smollm2_dir: Path) -> None:
    """The prompt ends where the chain starts, no think block is open, and the turn ends with a special token."""
    templates = pytest.importorskip("axolotl.utils.chat_templates")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.chat_template = templates.get_chat_template_from_config(load(name), tokenizer=tokenizer)
    dialogue = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    prompt = tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
    assert [prompt.count(turn["content"]) for turn in dialogue] == [1, 1, 1, 1]
    assert re.search(r"assistant[:\n]$", prompt, flags=re.IGNORECASE)
    assert "<think>" not in prompt
    answered = tokenizer.apply_chat_template([*dialogue, {"role": "assistant", "content": "Four."}], tokenize=False)
    assert answered.split("Four.")[1].startswith(tokenizer.eos_token)


def test_vicuna_prompt() -> None:
    """The format of Vicuna 1.1, character by character."""
    from transformers.utils.chat_template_utils import render_jinja_template

    dialogue = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B."},
        {"role": "user", "content": "C?"},
    ]
    template = load("wizard-vicuna-7b.yml")["chat_template_jinja"]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered, _ = render_jinja_template([dialogue], chat_template=template, add_generation_prompt=True, **tokens)
    assert rendered == [
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: A? ASSISTANT: B.</s>USER: C? ASSISTANT:"
    ]


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_differs_only_where_marked(name: str) -> None:
    def flat(config: dict[str, Any]) -> dict[str, Any]:
        return {**{key: value for key, value in config.items() if key != "mote"}, **config["mote"]}

    base, changed = flat(load("llama3-8b.yml")), flat(load(name))
    different = {key for key in base.keys() | changed.keys() if base.get(key) != changed.get(key)} - {"output_dir"}
    marked = re.findall(r"^ *(\w+):.*# <--", (CONFIGS / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    if "mote" in marked:  # the block as a whole
        different -= set(load("llama3-8b.yml")["mote"])
        marked.remove("mote")
    assert different == set(marked)


def test_deepspeed_configs_name_their_stage() -> None:
    stages = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]["stage"]
        for file in (CONFIGS / "deepspeed").glob("*.json")
    }
    assert stages == {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_cpu_offload": 3}


@pytest.mark.parametrize("name", ["llama3-8b.yml", *VARIANTS])
def test_paper_settings(name: str) -> None:
    config = load(name)
    assert config["lora_r"] == 16
    assert config["num_epochs"] == 3
    assert config["learning_rate"] == 2e-5
    assert config["micro_batch_size"] * config["gradient_accumulation_steps"] == 16
    assert config["mote"]["expert_weight"] == 0.5
    assert config["lora_target_linear"]
