"""Options that users combine with `adapter: mote`: each works in a run of two steps.

Every run combines as many as can be together. docs/configuration.md has the table, and tests/bench/options.py runs each
option by itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .conftest import Runs, Workshop, job

NO_EVALUATION = dict.fromkeys(("test_datasets", "eval_strategy", "eval_steps"))
GROKFAST = ["axolotl_mote.MotePlugin", "axolotl.integrations.grokfast.GrokfastPlugin"]


def logged(log: str, key: str) -> list[float]:
    return [float(value) for value in re.findall(rf"'{re.escape(key)}': '?([-+\w.]+)", log)]


def losses(workshop: Workshop, name: str) -> list[float]:
    return logged((workshop.folder / name / "train.log").read_text(encoding="utf-8"), "loss")


@job
def packed_options(workshop: Workshop, runs: Runs) -> Path:
    return workshop.train(
        "packed_options",
        sample_packing=True,
        eval_sample_packing=True,
        pad_to_sequence_len=True,
        sequence_len=1024,
        micro_batch_size=1,
        max_steps=2,
        test_datasets=None,
        val_set_size=4,
        eval_steps=2,
        eval_batch_size=1,
        curriculum_sampling=True,
        shuffle_merged_datasets=False,
        shuffle_before_merging_datasets=True,
        dataset_exact_deduplication=True,
        neftune_noise_alpha=5.0,
        loraplus_lr_ratio=4.0,
        learning_rate=0.01,
        max_grad_norm=0.5,
        use_tensorboard=True,
        plugins=GROKFAST,
        include_tkps=True,
    )


@job
def best_checkpoint(workshop: Workshop, runs: Runs) -> Path:
    """The learning rate is so high that every step makes the model worse: training stops, and step 1 is the best."""
    return workshop.train(
        "best_checkpoint",
        max_steps=4,
        learning_rate=10.0,
        embedding_lr=5.0,
        group_by_length=True,
        gradient_checkpointing=True,
        activation_offloading="hidden_states",
        save_strategy="steps",
        save_steps=1,
        eval_strategy=None,
        eval_steps=1,
        load_best_model_at_end=True,
        early_stopping_patience=1,
    )


@job
def bf16_on_the_cpu(workshop: Workshop, runs: Runs) -> Path:
    return workshop.train(
        "bf16_on_the_cpu",
        bf16=True,
        fp16=None,
        max_steps=2,
        eval_strategy="no",
        eval_steps=None,
        load_in_4bit=True,
        embeddings_skip_upcast=True,
        optimizer="paged_adamw_8bit",
        adam_epsilon=None,
        learning_rate=0.01,
        gradient_checkpointing=True,
        selective_checkpointing=True,
        lr_groups=[{"name": "output", "modules": ["o_proj"], "lr": 0.02}],
    )


@pytest.mark.needs("packed_options")
def test_packing_with_what_is_combined_with_it(runs: Any, workshop: Any) -> None:
    adapter = load_file(runs.get("packed_options") / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())
    log = (workshop.folder / "packed_options" / "train.log").read_text(encoding="utf-8")
    first, second = logged(log, "loss")
    assert second < first < 11.5
    before, after = logged(log, "eval_loss")[:2]
    assert after < before < 11.5
    assert logged(log, "eval_tokens/response")[0] > 50
    assert list((workshop.folder / "packed_options" / "out").rglob("events.out.tfevents.*"))


@pytest.mark.needs("best_checkpoint")
def test_the_best_checkpoint_is_loaded_at_the_end(runs: Any, workshop: Any) -> None:
    folder = runs.get("best_checkpoint")
    log = (workshop.folder / "best_checkpoint" / "train.log").read_text(encoding="utf-8")
    evaluated = logged(log, "eval_loss")[1:]  # without the one before the first step
    assert len(evaluated) < 4  # stopped early
    best = evaluated.index(min(evaluated)) + 1
    assert best < len(evaluated)
    final = load_file(folder / "adapter_model.safetensors")
    saved = load_file(folder / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], saved[name]) for name in final)
    last = load_file(folder / f"checkpoint-{len(evaluated)}" / "adapter_model.safetensors")
    assert any(not torch.equal(final[name], last[name]) for name in final)


@pytest.mark.needs("bf16_on_the_cpu")
def test_bf16_trains_on_the_cpu_and_nothing_is_evaluated(runs: Any, workshop: Any) -> None:
    adapter = load_file(runs.get("bf16_on_the_cpu") / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    log = (workshop.folder / "bf16_on_the_cpu" / "train.log").read_text(encoding="utf-8")
    first, second = logged(log, "loss")
    assert second < first < 11.5
    assert not logged(log, "eval_loss")
