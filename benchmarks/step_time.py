"""Step time of MoTE beside plain LoRA of the same total rank: forward, loss, backward, optimizer, in one process.

    python benchmarks/step_time.py --model models/SmolLM2-135M-Instruct              # CPU
    python benchmarks/step_time.py --device cuda --shape llama-3.1-8b --rows 4       # one GPU, random weights

Every variant has its own copy of the base model; they take turns step by step, so that whatever else runs on the
machine meets them alike. Printed is the median, and the ratio to plain LoRA as the median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from axolotl_mote.adapter import add_mote_adapter, mote_model
from axolotl_mote.config import MoteConfig
from axolotl_mote.loss import shift
from axolotl_mote.steps import IGNORE_INDEX

STEPS = ["analysis", "guidance", "response"]
SHARES = [0.2, 0.2, 0.15, 0.45]  # question and steps, by tokens, about as in the seed chains
SHAPES = {
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    },
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Variant:
    name: str
    step: Callable[[], None]
    times: list[float]


def chains(rows: int, tokens: int, vocab: int, marker_ids: list[int], device: str) -> tuple[Tensor, Tensor]:
    """Random chains with every step in place: input_ids and labels, shape (rows, tokens)."""
    ids = torch.randint(10, vocab - 10, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    start = round(SHARES[0] * tokens)
    labels[:, :start] = IGNORE_INDEX
    for step, share in enumerate(SHARES[1:]):
        end = min(start + round(share * tokens), tokens)
        ids[:, start], ids[:, end - 1] = marker_ids[2 * step], marker_ids[2 * step + 1]
        start = end
    labels = torch.where(labels == IGNORE_INDEX, labels, ids)
    return ids.to(device), labels.to(device)


def base_model(options: argparse.Namespace) -> Any:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    attention = "flex_attention" if options.device == "cuda" else "sdpa"
    if options.shape:
        config = LlamaConfig(**SHAPES[options.shape], attn_implementation=attention)
        with torch.device(options.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        config = AutoConfig.from_pretrained(options.model, attn_implementation=attention)
        model = AutoModelForCausalLM.from_pretrained(options.model, config=config, dtype=dtype).to(options.device)
    model.config.use_cache = False
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def variant(name: str, model: Any, loss: Callable[[], Tensor], device: str) -> Variant:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return Variant(name, step, [])


def lora_variant(options: argparse.Namespace, rank: int, marker_ids: list[int]) -> Variant:
    model = get_peft_model(base_model(options), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR))
    vocab = model.config.vocab_size
    ids, labels = chains(options.rows, options.tokens, vocab, marker_ids, options.device)
    return variant(f"LoRA r={rank}", model, lambda: model(input_ids=ids, labels=labels).loss, options.device)


def mote_variant(options: argparse.Namespace, dropout: float, marker_ids: list[int]) -> Variant:
    config = MoteConfig(
        r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM", steps=STEPS, marker_ids=marker_ids
    )
    model = add_mote_adapter(base_model(options), config)
    routing = mote_model(model).routing  # type: ignore[union-attr]
    routing.step_dropout = (dropout, dropout) if dropout else ()
    ids, labels = chains(options.rows, options.tokens, model.config.vocab_size, marker_ids, options.device)
    targets = shift(labels, IGNORE_INDEX)
    count = (targets != IGNORE_INDEX).sum()

    def loss() -> Tensor:
        routing.step += 1
        return model(input_ids=ids, targets=targets).loss.sum() / count

    return variant(f"MoTE 4 x r=16, step dropout {dropout:g}", model, loss, options.device)


def run(options: argparse.Namespace) -> list[Variant]:
    vocab = (
        SHAPES[options.shape]["vocab_size"] if options.shape else AutoConfig.from_pretrained(options.model).vocab_size
    )
    marker_ids = list(range(vocab - 6, vocab))
    variants = [
        lora_variant(options, 64, marker_ids),
        mote_variant(options, 0.0, marker_ids),
        mote_variant(options, 0.3, marker_ids),
    ]
    for round_number in range(options.warmup + options.steps):
        for each in variants if round_number % 2 else reversed(variants):
            start = time.perf_counter()
            each.step()
            if round_number >= options.warmup:
                each.times.append(time.perf_counter() - start)
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="model folder")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    options = parser.parse_args()
    variants = run(options)
    console = Console()
    table = Table(title=f"{options.rows} x {options.tokens} tokens, {options.device}, {options.steps} steps each")
    for column in ("variant", "median ms", "fastest ms", "x LoRA"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for each in variants:
        ratio = statistics.median(a / b for a, b in zip(each.times, variants[0].times, strict=True))
        median, fastest = statistics.median(each.times) * 1e3, min(each.times) * 1e3
        table.add_row(each.name, f"{median:.0f}", f"{fastest:.0f}", f"{ratio:.3f}")
    console.print(table)
    if options.device == "cuda":
        console.print(
            f"{torch.cuda.get_device_name()}, peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        )


if __name__ == "__main__":
    main()
