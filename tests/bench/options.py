"""Run each option of axolotl's YAML by itself with `adapter: mote`: two steps of a tiny model on the CPU.

    .venv/bin/python tests/bench/options.py                   # all of them, 5 to 15 minutes
    .venv/bin/python tests/bench/options.py muon best wandb   # some

It prints one line for each: the exit code, the seconds, the losses, and the error of a run that failed. An option whose
package is missing fails with the name of the package. docs/configuration.md has the table of what works; the tests
run the combinations in tests/e2e/test_options.py.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "tests"), str(REPO / "tests" / "e2e"), str(REPO)]

NO_EVALUATION = dict.fromkeys(("test_datasets", "eval_strategy", "eval_steps"))
CHECKPOINTING = {"gradient_checkpointing": True}


def plugins(name: str) -> dict[str, Any]:
    return {"plugins": ["axolotl_mote.MotePlugin", f"axolotl.integrations.{name}"], **NO_EVALUATION}


def optimizer(name: str, **changes: Any) -> dict[str, Any]:
    return {"optimizer": name, **changes, **NO_EVALUATION}


OPTIONS: dict[str, dict[str, Any]] = {
    "packed": {"sample_packing": True, "pad_to_sequence_len": True, "eval_sample_packing": True, "sequence_len": 1024},
    "packed_train_only": {"sample_packing": True, "eval_sample_packing": False, "sequence_len": 1024},
    "val_set_size": {"val_set_size": 0.25, "test_datasets": None},
    "group_by_length": {"group_by_length": True, **NO_EVALUATION},
    "curriculum": {"curriculum_sampling": True, "shuffle_merged_datasets": False, **NO_EVALUATION},
    "dataset_processes": {"dataset_processes": 2, "dataset_num_proc": None, **NO_EVALUATION},
    "workers": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 4, **NO_EVALUATION},
    "neftune": {"neftune_noise_alpha": 5.0, **NO_EVALUATION},
    "loraplus": {"loraplus_lr_ratio": 16.0, **NO_EVALUATION},
    "lr_groups": {"lr_groups": [{"name": "o", "modules": ["o_proj"], "lr": 1e-3}], **NO_EVALUATION},
    "embedding_lr": {"embedding_lr": 1e-3, **NO_EVALUATION},
    "selective_checkpointing": {"selective_checkpointing": True, **CHECKPOINTING, **NO_EVALUATION},
    "hidden_states": {"activation_offloading": "hidden_states", **CHECKPOINTING, **NO_EVALUATION},
    "offload": {"activation_offloading": True, **CHECKPOINTING, **NO_EVALUATION},
    "muon": optimizer("muon"),
    "sinkgd": optimizer("sinkgd"),
    **{
        name: optimizer(name)
        for name in (
            "adamw_torch_fused",
            "adamw_8bit",
            "paged_adamw_8bit",
            "lion_8bit",
            "adafactor",
            "ademamix",
            "schedule_free_adamw",
            "adopt_adamw",
            "adamc",
            "came_pytorch",
            "optimi_adamw",
            "polora",
        )
    },
    "bf16": {"bf16": True, "fp16": None, **NO_EVALUATION},
    "4bit": {"load_in_4bit": True, "embeddings_skip_upcast": True, **NO_EVALUATION},
    "eval_no": {"eval_strategy": "no", "eval_steps": None},
    "best": {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1},
    "generate_samples": {"generate_samples": True, "num_generation_samples": 1, "generation_max_new_tokens": 4},
    "causal_lm_eval": {"do_causal_lm_eval": True, "eval_causal_lm_metrics": ["perplexity"]},
    "tensorboard": {"use_tensorboard": True, **NO_EVALUATION},
    "wandb": {"use_wandb": True, "wandb_mode": "offline", "wandb_project": "x", **NO_EVALUATION},
    "mlflow": {"use_mlflow": True, "mlflow_tracking_uri": "runs", "mlflow_experiment_name": "x", **NO_EVALUATION},
    "eager": {"attn_implementation": "eager", **NO_EVALUATION},
    "flash_attention": {"attn_implementation": None, "flash_attention": True, **NO_EVALUATION},
    "torch_compile": {"torch_compile": True, **NO_EVALUATION},
    "grokfast": plugins("grokfast.GrokfastPlugin"),
    "liger": {"liger_rms_norm": True, "liger_glu_activation": True, **plugins("liger.LigerPlugin")},
    "cut_cross_entropy": plugins("cut_cross_entropy.CutCrossEntropyPlugin"),
    "kd": plugins("kd.KDPlugin"),
    "lisa": {"lisa_n_layers": 1, "lisa_step_interval": 1, **NO_EVALUATION},
    "streaming": {"streaming": True, **NO_EVALUATION},
}


def workshop(folder: Path) -> Any:
    """The end-to-end tests' own, on a tiny model and twelve chains."""
    from kit import tiny_model
    from transformers import AutoTokenizer

    from tests.e2e.conftest import Workshop

    model = tiny_model(49152, tied=False, hidden=64, initializer_range=0.02)
    model.config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    model.save_pretrained(folder / "tiny")
    AutoTokenizer.from_pretrained(REPO / "models" / "SmolLM2-135M-Instruct").save_pretrained(folder / "tiny")
    rows = (REPO / "example_configs" / "data" / "seed_chains.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    (folder / "chains.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return Workshop(folder, folder / "tiny", folder / "chains.jsonl", folder)


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        shop = workshop(Path(name))
        for option in names or OPTIONS:
            start = time.monotonic()
            result = shop.run("train", option, **{"max_steps": 2, "eval_steps": 2, **OPTIONS[option]})
            losses = re.findall(r"'loss': '?([-+\w.]+)", result.log)
            errors = [line.strip() for line in result.log.splitlines() if re.search(r"Error\b|must ", line)]
            error = errors[-1][:200] if result.returncode and errors else ""
            took = time.monotonic() - start
            print(f"{option:24} exit {result.returncode:3} {took:4.0f} s  {' '.join(losses):14} {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
