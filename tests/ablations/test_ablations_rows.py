"""Rows of a table differ in what they are about and in nothing else: scale, rank, data, steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rows import CONFIGS, MAIN, ROWS, SIZES, STEPS, load, small

from axolotl_mote.builder.settings import load_settings
from axolotl_mote.training.args import MoteOptions

TRAINED = [name for name, row in ROWS.items() if row.kind != "none"]
SAME = ("base_model", "datasets", "test_datasets", "max_steps", "num_epochs", "micro_batch_size", "seed", "bf16",
        "sequence_len", "warmup_steps", "optimizer", "lr_scheduler", "weight_decay", "attn_implementation",
        "lora_dropout", "lora_target_linear", "chat_template", "pad_to_multiple_of")  # fmt: skip


def configs(name: str) -> list[dict[str, Any]]:
    row = ROWS[name]
    return [small(config, SIZES["lookup"], row.kind, 1, "train.jsonl", "heldout.jsonl") for config in row.configs]


def scales(config: dict[str, Any]) -> set[float]:
    """What an update A x of one expert of a step's token is multiplied by."""
    scaling = config["lora_alpha"] / config["lora_r"]
    if config["adapter"] == "lora":  # the two experts of a mixture share the weight 1
        return {scaling / 2} if "mixture" in config else {scaling}
    weight = config["mote"].get("expert_weight", 0.5)
    return {w * scaling for w in (weight, 1 - weight)} - {0.0}


@pytest.mark.parametrize("name", [n for n in TRAINED if not n.startswith("expert-weight")])
def test_experts_have_equal_scale(name: str) -> None:
    for config in (*configs(name), *map(load, ROWS[name].configs)):
        assert scales(config) == {1.0}


def test_total_rank() -> None:
    ranks = {name: configs(name)[0]["lora_r"] for name in MAIN}
    experts = len(STEPS) + 1
    assert ranks["lora-r"] == ranks["mote"] == SIZES["lookup"].rank
    assert ranks["lora-4r"] == ranks["mixture"] == experts * ranks["mote"]
    assert load(ROWS["mixture"].configs[0])["mixture"]["experts"] == experts


@pytest.mark.parametrize("name", TRAINED)
def test_a_small_run_differs_only_by_its_row(name: str) -> None:
    reference = configs("mote")[0]
    for config in configs(name):
        assert {key: config.get(key) for key in SAME} == {key: reference.get(key) for key in SAME}
        assert not {"special_tokens", "val_set_size", "warmup_ratio"} & config.keys()
        MoteOptions(**config["mote"])
        if config["adapter"] == "lora":
            kernels = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
            assert [config[key] for key in kernels] == [False] * 4


def test_separate_models_train_one_step_each() -> None:
    for step, config in zip(STEPS, configs("separate"), strict=True):
        assert MoteOptions(**config["mote"]).loss_weights == [1.0, *(float(other == step) for other in STEPS)]


def test_every_ablation_is_a_row() -> None:
    used = {Path(config).name for row in ROWS.values() for config in row.configs}
    assert {file.name for file in (CONFIGS / "ablations").glob("*.yml")} <= used


def test_prompting_is_a_valid_build() -> None:
    settings = load_settings(CONFIGS / ROWS["prompting"].configs[0])
    assert settings.chain == "full"
    assert not settings.check


def test_an_uneven_rank_is_refused() -> None:
    import dataclasses

    with pytest.raises(ValueError, match="rank must divide 16; got 3"):
        small("llama3-8b.yml", dataclasses.replace(SIZES["lookup"], rank=3), "mote", 0, "a", "b")


@pytest.mark.parametrize("name", TRAINED)
def test_axolotl_accepts_the_small_run(name: str, monkeypatch: pytest.MonkeyPatch, smollm2_dir: Path) -> None:
    pytest.importorskip("axolotl")
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.chdir(CONFIGS.parent)
    for config in configs(name):
        values = yaml.safe_load(yaml.safe_dump(config)) | {"output_dir": "outputs/x"}
        cfg = DictDefault(values)
        prepare_plugins(cfg)
        capabilities = {"bf16": True, "fp8": False, "tf32": False, "n_gpu": 0, "compute_capability": None}
        valid = validate_config(cfg, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})
        assert valid.learning_rate == SIZES["lookup"].learning_rates[ROWS[name].kind]
