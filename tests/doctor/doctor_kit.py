"""Sixteen short chains, and a configuration that trains on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

WORDS = ("red", "green", "blue", "amber", "grey", "white", "black", "brown")


def rows() -> list[dict[str, Any]]:
    """Of sixteen chains, half have an analysis and a quarter a guidance."""
    found = []
    for number in range(16):
        word = WORDS[number % 8]
        found.append(
            {
                "messages": [{"role": "user", "content": f"What is {word} {number}?"}],
                "analysis": f"They ask about {word}." if number % 2 == 0 else None,
                "guidance": f"Say that {word} is a color." if number % 4 == 0 else None,
                "response": f"{word.title()} is color {number}.",
            }
        )
    return found


def write_tiny_config(folder: Path, model: Path, **changes: Any) -> Path:
    """Write a configuration and its data; a value of None removes the key."""
    chains = folder / "chains.jsonl"
    chains.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    config = {
        "base_model": str(model),
        "plugins": ["axolotl_mote.MotePlugin"],
        "adapter": "mote",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "mote": {"question_routing": "random", "step_dropout": 0.5},
        "datasets": [{"path": str(chains), "type": "axolotl_mote.chain"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 0,
        "dataloader_num_workers": 0,
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_epochs": 2,
        "optimizer": "adamw_torch",
        "learning_rate": 0.001,
        "seed": 42,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "output_dir": str(folder / "out"),
    }
    path = folder / "mote.yml"
    kept = {key: value for key, value in {**config, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(kept), encoding="utf-8")
    return path
