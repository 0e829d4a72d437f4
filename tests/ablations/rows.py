"""The rows of the paper's comparisons, and how a row's configuration becomes a run of minutes on one CPU core.

A row is the axolotl configuration in example_configs, at the paper's 8B setting. ``small`` overrides what makes it
large (base model, data, batch, precision, attention) and divides its rank and alpha by one number, so that what the row
changes stays as it is written there. Every row of a table trains on the same rows in the same order for as many steps;
learning rates are tuned once per kind of adapter, on rows of their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "example_configs"
MODEL = "models/SmolLM2-135M-Instruct"
STEPS = ("analysis", "guidance", "response")


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        kind: Which learning rate it gets: lora, mixture or mote.
        configs: Files below example_configs; several for separate models, one per step.
        shows: Where the paper has it.
        answers: How it is answered: any form (load_mote), fixed forms only (separate), or not at all.
    """

    kind: str
    configs: tuple[str, ...]
    shows: str
    answers: str = "all"


def _one(kind: str, name: str, shows: str, answers: str = "all") -> Row:
    return Row(kind, (f"ablations/{name}.yml" if "/" not in name else name.removeprefix("/"),), shows, answers)


ROWS: dict[str, Row] = {
    "lora-r": _one("lora", "lora-r16", "Table 4: LoRA"),
    "lora-4r": _one("lora", "lora-r64", "Figure 5: Single Model"),
    "mixture": _one("mixture", "token-mixture", "Table 4: Vanilla MoE"),
    "mote": _one("mote", "/llama3-8b.yml", "Table 4: MoTE"),
    "mote-no-skipping": _one("mote", "no-step-dropout", "Table 4: - Step Skipping"),
    "mote-no-shared": _one("mote", "no-shared-expert", "Table 4: - Shared Expert"),
    "mote-neither": _one("mote", "no-shared-expert-no-step-dropout", "Table 4: - Both"),
    "lora-2r": _one("lora", "lora-r32", "Table 4: LoRA (rank*2)"),
    "separate": Row(
        "lora", tuple(f"ablations/separate-{step}.yml" for step in STEPS), "Figure 5: Separate Models", "fixed"
    ),
    "question-mean": _one("mote", "question-mean", "ours"),
    "question-shared": _one("mote", "question-shared", "ours"),
    **{f"step-dropout-{p}": _one("mote", f"step-dropout-{p}", "Figure 3: p_dropout") for p in (0.1, 0.5, 0.7)},
    **{f"expert-weight-{w}": _one("mote", f"expert-weight-{w}", "3.2: alpha") for w in (0.25, 0.75, 1.0)},
    "self-answers": _one("mote", "self-answers", "Figure 7", "response"),
    "human-answers": _one("mote", "human-answers", "Figure 7", "none"),
    "prompting": Row("none", ("ablations/prompting.yml",), "Table 3", "base"),
}
MAIN = tuple(list(ROWS)[:7])
"""LoRA r and 4r, the mixture, MoTE and its three rows of Table 4."""


@dataclass(frozen=True)
class Sizes:
    """What makes a run small.

    Args:
        rank: Of one expert.
        batch: Rows of a step.
        steps: Optimizer steps.
        train: Rows to train on; ``steps * batch`` is one epoch.
        warmup: Steps of warm-up.
        sequence_len: Tokens of the longest chain.
        learning_rates: By kind of adapter.
    """

    rank: int
    batch: int
    steps: int
    train: int
    warmup: int
    sequence_len: int
    learning_rates: dict[str, float]


SIZES = {
    "lookup": Sizes(2, 8, 80, 640, 8, 128, {"lora": 4e-3, "mixture": 4e-3, "mote": 4e-3}),
    "safety": Sizes(16, 2, 39, 26, 4, 512, {"lora": 5e-4, "mixture": 5e-4, "mote": 5e-4}),  # the quick start's rate
}
"""Rank 2 and 80 steps: few enough that full chains do not reach 100 %, where all rows would be alike."""
TUNED = {"lora": "lora-4r", "mixture": "mixture", "mote": "mote"}
"""By kind of adapter, the row on which its learning rate for look-up is chosen."""
RATES = (4e-3, 8e-3, 2e-3)


def load(config: str) -> dict[str, Any]:
    """A configuration file below example_configs."""
    values: dict[str, Any] = yaml.safe_load((CONFIGS / config).read_text(encoding="utf-8"))
    return values


def small(
    config: str, sizes: Sizes, kind: str, seed: int, train: str, heldout: str, base_model: str = MODEL
) -> dict[str, Any]:
    """A row's configuration as a small run, without its output folder.

    Args:
        config: File below example_configs.
        sizes: How small.
        kind: Picks the learning rate.
        seed: Of the run.
        train: File of chain rows to train on.
        heldout: File of chain rows whose loss is measured.
        base_model: The small model.

    Raises:
        ValueError: If the rank of the file cannot be divided to that of ``sizes``.
    """
    values = load(config)
    share = 16 // sizes.rank  # the files say 16 for one expert
    if sizes.rank * share != 16 or values["lora_r"] % share or values["lora_alpha"] % share:
        raise ValueError(f"rank must divide 16; got {sizes.rank} for {config}. Use 1, 2, 4, 8 or 16.")
    for key in ("special_tokens", "val_set_size", "warmup_ratio"):
        values.pop(key, None)
    if values["adapter"] == "lora":
        values["plugins"] = [*values["plugins"], "ablation_plugins.SameMarkersPlugin"]
        values["lora_fan_in_fan_out"] = False  # axolotl otherwise writes null, which no LoRA configuration may hold
    epochs = -(-sizes.steps * sizes.batch // sizes.train)
    return values | {
        "base_model": base_model,
        "chat_template": "chatml",  # without the system turn of SmolLM2's own template
        "lora_r": values["lora_r"] // share,
        "lora_alpha": values["lora_alpha"] // share,
        "datasets": [{"path": train, "type": "axolotl_mote.chain"}],
        "test_datasets": [{"path": heldout, "type": "axolotl_mote.chain", "ds_type": "json", "split": "train"}],
        "dataset_num_proc": 0,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "sequence_len": sizes.sequence_len,
        "pad_to_multiple_of": 8,
        "micro_batch_size": sizes.batch,
        "gradient_accumulation_steps": 1,
        "eval_batch_size": 8,
        "max_steps": sizes.steps,
        "num_epochs": epochs,
        "warmup_steps": min(sizes.warmup, max(0, sizes.steps - 1)),
        "learning_rate": sizes.learning_rates[kind],
        "seed": 42 + seed,
        "bf16": True,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        "eval_strategy": "steps",
        "eval_steps": sizes.steps,
        "save_strategy": "steps",
        "save_steps": sizes.steps,
        "save_only_model": True,
        "logging_steps": max(1, min(10, sizes.steps // 2)),
    }


def digest(*parts: Any) -> str:
    """Twelve hexadecimal digits of whatever a result depends on."""
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
