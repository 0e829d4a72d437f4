"""A tiny model, and sessions of the doctor on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doctor_kit import write_tiny_config
from kit import tiny_model, tiny_tokenizer

from axolotl_mote.doctor.session import Session

os.environ["AXOLOTL_TEE_STDOUT"] = "0"  # axolotl replaces the streams for good, also those of pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama whose table ends before the markers, with a byte tokenizer that knows none.

    64 wide: on a CPU with AVX512-BF16 bitsandbytes packs 4-bit weights by blocks of 64 inputs, and fails on fewer.
    """
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(hidden=64)
    model.config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    model.save_pretrained(folder)
    tiny_tokenizer(()).save_pretrained(folder)
    return folder


@pytest.fixture
def open_session(tmp_path: Path, tiny_folder: Path) -> Callable[..., Session]:
    """A session on such a configuration; one process unless ``processes`` says otherwise."""

    def open_one(steps: int = 4, processes: int = 1, **changes: Any) -> Session:
        folder = tmp_path / "runs"
        folder.mkdir()
        return Session(write_tiny_config(tmp_path, tiny_folder, **changes), folder, steps, processes)

    return open_one
