"""A tiny model, sixteen short chains and a configuration, and sessions of the doctor on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kit import tiny_model, tiny_tokenizer

from axolotl_mote.doctor.session import Session

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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama whose table ends before the markers, with a byte tokenizer that knows none."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model()
    model.config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    model.save_pretrained(folder)
    tiny_tokenizer(()).save_pretrained(folder)
    return folder


@pytest.fixture
def write_config(tmp_path: Path, tiny_folder: Path) -> Callable[..., Path]:
    """Write a configuration; a value of None removes the key."""

    def write(**changes: Any) -> Path:
        chains = tmp_path / "chains.jsonl"
        if not chains.exists():
            chains.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
        config = {
            "base_model": str(tiny_folder),
            "plugins": ["axolotl_mote.MotePlugin"],
            "adapter": "mote",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_linear": True,
            "mote": {"question_routing": "random", "step_dropout": 0.5},
            "datasets": [{"path": str(chains), "type": "axolotl_mote.chain"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
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
            "output_dir": str(tmp_path / "out"),
        }
        path = tmp_path / "mote.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in {**config, **changes}.items() if v is not None}))
        return path

    return write


@pytest.fixture
def open_session(tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Session]:
    """A session on such a configuration; one process unless ``processes`` says otherwise."""

    def open_one(steps: int = 4, processes: int = 1, **changes: Any) -> Session:
        folder = tmp_path / "runs"
        folder.mkdir()
        return Session(write_config(**changes), folder, steps, processes)

    return open_one
