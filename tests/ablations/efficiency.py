"""One masked pass against the expanded data sets (the paper's Table 6): FLOPs, time and held-out loss in one run.

    python tests/ablations/efficiency.py            # SmolLM2, the 26 seed chains, 3 epochs, one thread
    python tests/ablations/efficiency.py --bf16     # about half the time on a CPU with AVX-512 BF16 or AMX
    python tests/ablations/efficiency.py --size tiny --epochs 2

`masked` trains every chain once an epoch with step dropout. `expanded` trains the up to seven chains that it stands for
as rows of their own, without step dropout. Both see the same chains in the same order, for as many epochs and as many
optimizer steps: a step of `expanded` covers all rows of the chains that a step of `masked` covers. They take turns step
by step, so that whatever else the machine does hits both alike.

FLOPs are counted in the first epoch by torch's counter, forward and backward; time is the CPU time of the other epochs,
without the optimizer, which costs both the same. Held-out loss is per token on full chains that neither trains on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, get_cosine_schedule_with_warmup

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import markers
from axolotl_mote.files import read_all_rows
from axolotl_mote.model.adapter import add_mote_adapter, mote_model
from axolotl_mote.model.config import MoteConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/bench"))

from batches import (  # noqa: E402
    STEPS,
    Batch,
    Document,
    expanded_rows,
    full_rows,
    in_groups,
    padded,
    random_documents,
    split_steps,
)

MODEL = ROOT / "models/SmolLM2-135M-Instruct"
CHAINS = ROOT / "example_configs/data/seed_chains.jsonl"
HELDOUT = ROOT / "example_configs/data/seed_chains_heldout.jsonl"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS = 2
"""Chains of an optimizer step, and rows of a micro-batch."""
FLOPS, SECONDS, LOSS = 0.30, 0.40, 0.02
"""Largest ratios of FLOPs and time, and largest relative difference of the held-out losses."""


@dataclass
class Variant:
    """One way to train, with what it has used up."""

    model: PeftModel
    steps: list[list[Batch]]
    optimizer: Any
    schedule: Any
    flops: int = 0
    seconds: float = 0.0
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(batch.input_ids.numel() for batches in self.steps for batch in batches)

    def step(self, epoch: int, number: int, autocast: AbstractContextManager[Any]) -> None:
        """One optimizer step; counts FLOPs in the first epoch and time in the others."""
        routing = mote_model(self.model).routing  # type: ignore[union-attr]
        routing.step = epoch * len(self.steps) + number  # other steps are dropped in every epoch
        batches = self.steps[number]
        scored = sum(int((batch.targets >= 0).sum()) for batch in batches)
        counter = FlopCounterMode(display=False) if epoch == 0 else None
        start = time.process_time()
        for batch in batches:
            with counter or nullcontext():
                with autocast:
                    loss = _losses(self.model, batch)
                (loss / scored).backward()
            if counter is not None:
                self.flops += counter.get_total_flops()
        self.seconds += 0.0 if counter else time.process_time() - start
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()


def _losses(model: PeftModel, batch: Batch) -> torch.Tensor:
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    output = model(**inputs, targets=batch.targets, scored=batch.scored)
    return cast(torch.Tensor, output.loss.sum())


@torch.no_grad()
def heldout_loss(model: PeftModel, batches: list[Batch], autocast: AbstractContextManager[Any]) -> float:
    """Mean loss per step token."""
    model.eval()
    with autocast:
        total = sum(float(_losses(model, batch)) for batch in batches)
    model.train()
    return total / sum(int((batch.targets >= 0).sum()) for batch in batches)


def documents(options: argparse.Namespace) -> tuple[list[Document], list[Document], list[int], ChainCodec | None]:
    """Chains to train on, held-out ones, the marker ids and the codec of real chains."""
    if options.size == "tiny":
        made = random_documents([40 + 3 * n for n in range(8)], 320, list(range(314, 320)))
        return made[:6], made[6:], list(range(314, 320)), None
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": markers(STEPS)}, replace_extra_special_tokens=False)
    codec = ChainCodec(tokenizer, STEPS)
    marker_ids = list(codec.vocabulary.marker_ids)
    train, heldout = (
        [split_steps(codec.encode_chain(row)["input_ids"], marker_ids) for row in read_all_rows(path)]
        for path in (CHAINS, HELDOUT)
    )
    return train, heldout, marker_ids, codec


def load_base(options: argparse.Namespace) -> Any:
    """The frozen model."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    if options.size == "tiny":
        config = LlamaConfig(**TINY, num_key_value_heads=2, vocab_size=320)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, attn_implementation="sdpa")


def variant(
    options: argparse.Namespace,
    dropout: float,
    steps: list[list[Batch]],
    marker_ids: list[int],
    codec: ChainCodec | None,
) -> Variant:
    """A fresh adapter, the same in both variants, and its optimizer."""
    base = load_base(options)
    config = MoteConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=LINEAR,
        task_type="CAUSAL_LM",
        steps=STEPS,
        marker_ids=marker_ids,
    )
    torch.manual_seed(1)
    model = add_mote_adapter(base, config, codec.marker_words() if codec else None).train()
    routing = mote_model(model).routing  # type: ignore[union-attr]
    routing.step_dropout, routing.seed = (dropout, dropout), options.seed
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], options.learning_rate, weight_decay=0
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 4, options.epochs * len(steps))
    return Variant(model, steps, optimizer, schedule)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train both variants and compare them."""
    torch.set_num_threads(1)
    train, heldout, marker_ids, codec = documents(options)
    groups = in_groups(train, ROWS)
    kinds = {
        "masked": (options.dropout, [[padded(full_rows(group))] for group in groups]),
        "expanded": (0.0, [[padded(part) for part in in_groups(expanded_rows(group), ROWS)] for group in groups]),
    }
    built = {name: variant(options, *kind, marker_ids, codec) for name, kind in kinds.items()}
    autocast = torch.autocast("cpu", torch.bfloat16) if options.bf16 else nullcontext()
    tests = [padded(part) for part in in_groups(full_rows(heldout), ROWS)]
    before = heldout_loss(built["masked"].model, tests, autocast)
    for epoch in range(options.epochs):
        for number in range(len(groups)):
            for one in built.values():
                one.step(epoch, number, autocast)
        print(f"epoch {epoch + 1} of {options.epochs}", file=sys.stderr, flush=True)
    found = {
        name: {
            "tokens": one.tokens,
            "petaflops": one.flops / 1e15,
            "seconds": one.seconds / (options.epochs - 1),
            "heldout_loss": heldout_loss(one.model, tests, autocast),
        }
        for name, one in built.items()
    }
    masked, expanded = found["masked"], found["expanded"]
    ratios = {key: masked[key] / expanded[key] for key in masked}
    return {
        "heldout_loss_before": before,
        **found,
        "ratio": ratios,
        "settings": vars(options),
        "torch": torch.__version__,
    }


def verdict(ratio: dict[str, float]) -> list[str]:
    """What the ratios of masked to expanded miss; empty when all hold."""
    limits = {"petaflops": FLOPS, "seconds": SECONDS}
    missed = [f"{key} {ratio[key]:.3f} is above {limit}" for key, limit in limits.items() if not ratio[key] <= limit]
    if not abs(ratio["heldout_loss"] - 1) <= LOSS:
        missed.append(f"heldout_loss {ratio['heldout_loss']:.3f} is not within {LOSS} of 1")
    return missed


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, or JSON; exit status 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: FLOPs are counted in the first, time in the others.")
    result = measure(options)
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{'per epoch':14}{'masked':>12}{'expanded':>12}{'ratio':>8}")
        for key, ratio in result["ratio"].items():
            print(f"{key:14}{result['masked'][key]:12.4g}{result['expanded'][key]:12.4g}{ratio:8.3f}")
        print(f"held-out loss before training: {result['heldout_loss_before']:.3f}")
    missed = verdict(result["ratio"])
    print("\n".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
