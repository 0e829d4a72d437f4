"""Time of one training step: MoTE beside plain LoRA, axolotl's fused kernels and the usual ways to run several LoRAs.

    python tests/bench/train_step.py                                    # CPU: SmolLM2, 2 real chains, float32
    python tests/bench/train_step.py --device cuda --json > step.json   # Llama-3.1-8B shape, 8,192 packed tokens, bf16
    python tests/bench/train_step.py --size tiny --layout packed --checkpointing      # the GPU's path, on any machine

What is timed: forward, loss and backward. No optimizer, no data loading. On the CPU the tokens are real chains, two a
step and another two every round, padded as axolotl pads them; a GPU gets random chains of the same make. Every variant
sees the same tokens. Adapters have the dtype of the base model.

Which loss: plain LoRA gets what its users run, the model's own loss over all logits (`labels` passed to the model);
`peft_lora_r64_scored` gets ours, `token_losses` on the scored positions, so that beside it only the adapter differs.
MoTE runs what its training runs. axolotl's kernels get `token_losses` on all positions: chunks, as a fused loss has
them. MoTE trains rows of its own for the markers and pays for it here; plain LoRA does not train them, and its table
ends before them, as a base model's does.

How: the frozen base weights exist once and every variant's model refers to them, so all variants fit side by side. They
take turns round by round (A B C, C B A, ...), and the ratios are medians over rounds of the ratio within a round, so
that what else the machine does hits all alike; quartiles show the spread. On the CPU the default is one thread, whose
CPU time is counted: waiting for a busy machine does not count. Memory on a GPU is what one step of a variant needs on
its own: frozen weights, its adapter, and the peak above them. On the CPU it is the peak of the tensors that one step
allocates, as the profiler counts them: the resident size tells nothing, since the allocator keeps what earlier steps
freed.

`expanded` is the paper's alternative to step dropout: the up to seven chains that a row stands for, as ordinary rows
through MoTE without step dropout. Its time is that of all of them, for the same original rows as everywhere else.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from baselines import MaskedLoras, TokenRouter, axolotl_kernels, replace_linears
from batches import (
    STEPS,
    Batch,
    document_lengths,
    expanded_rows,
    full_rows,
    in_groups,
    packed,
    packed_up_to,
    padded,
    random_documents,
    real_documents,
)
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from axolotl_mote.model.adapter import add_mote_adapter, mote_model
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.loss import chunk_size, token_losses

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/SmolLM2-135M-Instruct"
CHAINS = ROOT / "example_configs/data/seed_chains.jsonl"
DROPOUT = (0.3, 0.3)
RANK = 16  # of one expert; four of them make 64
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Size:
    """A model and the tokens of one step; without `shape` the model is read from `models/`, and the chains are real."""

    shape: dict[str, Any] | None
    tokens: int
    """Of one row; a packed batch is one row. Real chains have their own lengths."""
    rows: int
    """Documents, one a row unless packed."""
    layout: str
    checkpointing: bool


SIZES = {
    "tiny": Size(
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 320}, 96, 2, "rows", False,
    ),
    "smollm2": Size(None, 256, 2, "rows", False),
    "llama-3.1-8b": Size(
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072},
        8192, 15, "packed", True,
    ),
}  # fmt: skip


# --- models ---------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What all variants share: the frozen model and the tokens."""

    options: argparse.Namespace
    base: PreTrainedModel
    marker_ids: list[int]
    steps: list[list[Batch]] = field(default_factory=list)
    """The micro-batches of the first step, the second, ...; rounds go through them again and again."""
    expanded: list[list[Batch]] = field(default_factory=list)

    @property
    def plain_attention(self) -> str:
        """Attention without step dropout: what a user of plain LoRA would take on this device."""
        return "flex_attention" if self.options.device == "cuda" else "sdpa"

    def copy_of_base(self, attention: str) -> PreTrainedModel:
        """A model of its own modules that refers to the one set of frozen weights."""
        shared = {id(tensor): tensor for tensor in itertools.chain(self.base.parameters(), self.base.buffers())}
        model = copy.deepcopy(self.base, shared)
        model.set_attn_implementation(attention)
        if self.options.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return cast(PreTrainedModel, model.train())


def load_bench(options: argparse.Namespace) -> Bench:
    """Build the base model and the batches."""
    size = SIZES[options.size]
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    torch.manual_seed(0)
    if size.shape is None:
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
        base = base.to(options.device)
    else:
        with torch.device(options.device):
            base = AutoModelForCausalLM.from_config(LlamaConfig(**size.shape), dtype=dtype)
    base.requires_grad_(False)
    base.config.use_cache = False
    vocab, is_packed = base.config.vocab_size, options.layout == "packed"
    if size.shape is None:
        documents, marker_ids = real_documents(MODEL, CHAINS)
    else:
        marker_ids = list(range(vocab - 6, vocab))
        lengths = document_lengths(size.tokens, size.rows) if is_packed else [size.tokens] * size.rows
        documents = random_documents(lengths, vocab, marker_ids)
    bench = Bench(options, base, marker_ids)
    for group in in_groups(documents, size.rows):
        rows, expanded = full_rows(group), expanded_rows(group)
        if is_packed:
            batches = [[packed(rows)], packed_up_to(expanded, sum(len(ids) for ids, _ in rows))]
        else:
            batches = [[padded(part) for part in in_groups(kind, size.rows)] for kind in (rows, expanded)]
        bench.steps.append([batch.to(options.device) for batch in batches[0]])
        bench.expanded.append([batch.to(options.device) for batch in batches[1]])
    return bench


def randomize(model: PeftModel) -> PeftModel:
    """Give every LoRA B values: products with zeros draw less power, and a GPU then runs faster than in training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_marker_rows" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


def peft_lora(rank: int) -> Callable[[Bench], PeftModel]:
    def build(bench: Bench) -> PeftModel:
        torch.manual_seed(3)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, task_type="CAUSAL_LM")
        base = bench.copy_of_base(bench.plain_attention)
        return randomize(cast(PeftModel, get_peft_model(base, config, autocast_adapter_dtype=False)))

    return build


def mote(attention: str | None = None) -> Callable[[Bench], PeftModel]:
    """MoTE; with an attention implementation named, steps are dropped through it."""

    def build(bench: Bench) -> PeftModel:
        torch.manual_seed(3)  # equal weights wherever the shapes are equal
        config = MoteConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=LINEAR,
            task_type="CAUSAL_LM",
            steps=STEPS,
            marker_ids=bench.marker_ids,
        )
        base = bench.copy_of_base(attention or bench.plain_attention)
        model = randomize(add_mote_adapter(base, config, autocast_adapter_dtype=False))
        if attention:
            mote_model(model).routing.step_dropout = DROPOUT  # type: ignore[union-attr]
        return model

    return build


# --- variants -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """How a variant is built, and where it cannot run."""

    build: Callable[[Bench], PeftModel]
    loss: str = "mote"
    """Of plain LoRA: `model` is the model's own, `all` ours on all positions, `scored` ours on the scored ones."""
    compiled: bool = False
    expanded: bool = False
    needs_cuda: str = ""
    """Why the variant needs a GPU; empty where it does not."""
    needs_packages: tuple[str, ...] = ()


NO_BACKWARD = "flex_attention has no backward on the CPU"
SPECS = {
    "peft_lora_r16": Spec(peft_lora(16), "model"),
    "peft_lora_r32": Spec(peft_lora(32), "model"),
    "peft_lora_r64": Spec(peft_lora(64), "model"),
    "peft_lora_r64_scored": Spec(peft_lora(64), "scored"),
    "mote": Spec(mote()),
    "peft_lora_r64_compiled": Spec(peft_lora(64), "model", compiled=True),
    "mote_compiled": Spec(mote(), compiled=True),
    "axolotl_kernels_r64_liger": Spec(
        lambda bench: axolotl_kernels(peft_lora(64)(bench)),
        "all",
        needs_cuda="axolotl's and Liger's kernels are Triton programs for a GPU",
        needs_packages=("axolotl", "liger_kernel"),
    ),
    "mote_dropout_flex_compiled": Spec(mote("flex_attention"), compiled=True, needs_cuda=NO_BACKWARD),
    "mote_dropout_dense": Spec(mote("sdpa")),
    "mote_dropout_flex": Spec(mote("flex_attention"), needs_cuda=NO_BACKWARD),
    "mote_dropout_varlen": Spec(mote("mote_varlen")),
    "mote_dropout_varlen_compiled": Spec(
        mote("mote_varlen"), compiled=True, needs_cuda="the CPU has only a reference loop for it"
    ),
    "mote_dropout_varlen_fa2": Spec(
        mote("flash_attention_2"), needs_cuda="flash-attn needs a GPU", needs_packages=("flash_attn",)
    ),
    "masked_loras": Spec(lambda bench: replace_linears(mote()(bench), MaskedLoras)),
    "token_router": Spec(lambda bench: replace_linears(mote()(bench), TokenRouter)),
    "expanded": Spec(mote(), expanded=True),
}


def reason_to_skip(spec: Spec, device: str) -> str | None:
    """Why a variant cannot run here, or None."""
    if spec.needs_cuda and device != "cuda":
        return spec.needs_cuda
    missing = [name for name in spec.needs_packages if importlib.util.find_spec(name) is None]
    return f"not run: {', '.join(missing)}" if missing else None


def total_loss(model: PeftModel, batch: Batch, loss: str) -> Tensor:
    """Sum of the losses of all targets, a scalar, by one of the ways of ``Spec.loss``; ``mote`` is that of training."""
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }
    if loss == "mote":
        return cast(Tensor, model(**inputs, targets=batch.targets, scored=batch.scored).loss.sum())
    causal: Any = model.get_base_model()
    if loss == "model":  # a count of one makes it the sum, as in training, where the count is that of all batches
        return cast(Tensor, model(**inputs, labels=batch.labels, num_items_in_batch=1).loss)
    hidden = causal.get_decoder()(**inputs, use_cache=False).last_hidden_state
    scored = batch.scored if loss == "scored" else None
    head = causal.get_output_embeddings()
    return token_losses(hidden, batch.targets, head, causal.config.vocab_size, scored=scored).sum()


@dataclass
class Variant:
    """A model with its adapter, ready to run, and what was measured of it."""

    name: str
    model: PeftModel
    loss: str
    steps: list[list[Batch]]
    memory: float | None = None
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tuner = mote_model(self.model)
        self.batches = self.steps[0]

    def prepare(self, number: int) -> None:
        """What happens between two steps and is not timed."""
        self.batches = self.steps[number % len(self.steps)]
        for parameter in self.model.parameters():
            parameter.grad = None
        if self.tuner is not None:
            self.tuner.routing.step = number  # other steps are dropped in every round

    def step(self) -> None:
        """Forward, loss and backward of all micro-batches."""
        total = sum(batch.input_ids.numel() for batch in self.batches)
        for batch in self.batches:
            (total_loss(self.model, batch, self.loss) / total).backward()


def build_variant(name: str, bench: Bench) -> Variant:
    spec, options = SPECS[name], bench.options
    model = spec.build(bench)
    if spec.compiled:
        for layer in cast(Any, model.get_base_model()).get_decoder().layers:
            layer.compile(backend=options.compile_backend)
    steps = bench.expanded if spec.expanded else bench.steps
    if spec.loss != "mote":
        steps = [[batch.below(bench.base.config.vocab_size) for batch in batches] for batches in steps]
    return Variant(name, model, spec.loss, steps)


@torch.no_grad()
def check_baselines() -> float:
    """Refuse to time a baseline that computes something else.

    Masked LoRAs must give MoTE's loss and plain LoRA another one, by whichever of the three ways it is computed.

    Returns:
        Relative difference between the losses of masked LoRAs and MoTE, on a tiny packed batch in float32.
    """
    bench = load_bench(argparse.Namespace(size="tiny", device="cpu", layout="packed", checkpointing=False))
    gated, masked, plain = mote()(bench), replace_linears(mote()(bench), MaskedLoras), peft_lora(16)(bench)
    batch = bench.steps[0][0]
    expected, got = (float(total_loss(model, batch, "mote")) for model in (gated, masked))
    difference = abs(got / expected - 1)
    ways = [float(total_loss(plain, batch, way)) for way in ("model", "all", "scored")]
    if not difference <= 1e-5 or abs(ways[0] / expected - 1) <= 1e-5:
        raise RuntimeError(f"masked_loras must equal mote, and plain LoRA must not; got {got}, {expected}, {ways[0]}.")
    if max(ways) - min(ways) > 1e-5 * ways[0]:
        raise RuntimeError(f"plain LoRA must have one loss, however it is computed; got {ways}.")
    return difference


# --- measuring ------------------------------------------------------------------------------------------------------


def milliseconds(work: Callable[[], None], device: str) -> float:
    """Time of one call: by events on a GPU; CPU time where there is one thread, wall time otherwise."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    before = clock()
    work()
    return (clock() - before) * 1e3


def measure_memory(variant: Variant, bench: Bench) -> None:
    """Run the longest step and note its memory in GiB; on a GPU with the frozen weights, as if it were alone."""
    sizes = [sum(batch.input_ids.numel() for batch in batches) for batches in variant.steps]
    variant.prepare(sizes.index(max(sizes)))
    gc.collect()
    if bench.options.device != "cuda":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            variant.step()
        # The public events leave out what an operator allocates.
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        variant.memory = max(itertools.accumulate(event.nbytes() for event in events)) / 2**30
        return
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    variant.step()
    frozen = {id(p): p for p in bench.base.parameters()}.values()
    trained = [p for p in variant.model.parameters() if p.requires_grad]
    own = sum(p.nbytes for p in frozen) + sum(p.nbytes for p in trained)
    variant.memory = (own + torch.cuda.max_memory_allocated() - before) / 2**30


def matmul_floor(bench: Bench) -> tuple[Callable[[int], None], str]:
    """The frozen matrix products of a round alone, as a job to time, and the formula in words.

    For every frozen linear layer W of the decoder: x W^T forward, once more if activations are recomputed, and g W for
    the gradient of its input. The head likewise; it is recomputed where the loss runs in chunks.
    """
    base: Any = bench.base
    weights = [module.weight for module in base.get_decoder().layers.modules() if isinstance(module, nn.Linear)]
    head = base.get_output_embeddings().weight
    tokens = [sum(batch.input_ids.numel() for batch in batches) for batches in bench.steps]
    forwards = 2 if bench.options.checkpointing else 1
    head_forwards = 2 if max(tokens) > chunk_size(base.config.vocab_size) else 1
    jobs = [(weight, forwards) for weight in weights] + [(head, head_forwards)]
    widths = {width for weight, _ in jobs for width in weight.shape}
    rows = {width: torch.randn(max(tokens), width, device=head.device, dtype=head.dtype) for width in widths}

    @torch.no_grad()
    def work(number: int) -> None:
        count = tokens[number % len(tokens)]
        for weight, times in jobs:
            for _ in range(times):
                F.linear(rows[weight.shape[1]][:count], weight)
            rows[weight.shape[0]][:count] @ weight

    formula = f"{forwards} forward + 1 input gradient per decoder linear, {head_forwards} + 1 for the head"
    return work, formula


@dataclass
class Result:
    """All that one run found out."""

    variants: list[Variant]
    skipped: dict[str, str]
    floor: list[float]
    floor_formula: str
    new_graphs: int
    token_ratio: float
    masked_difference: float


COMPILER = {"automatic_dynamic_shapes": False, "recompile_limit": 128, "fail_on_recompile_limit_hit": True}
"""Shapes repeat exactly from round to round; taken for dynamic after `expanded`, they would change the others' kernels.
And a variant that silently fell back to eager would be worse than an error."""


@torch._dynamo.config.patch(COMPILER)
def run(options: argparse.Namespace, say: Callable[[str], None]) -> Result:
    """Build, warm up, then let the variants take turns."""
    difference = check_baselines()
    if options.device == "cpu" and options.threads:
        torch.set_num_threads(options.threads)
    bench = load_bench(options)
    work, formula = matmul_floor(bench)
    variants: list[Variant] = []
    skipped: dict[str, str] = {}
    for name in options.variants:
        reason = reason_to_skip(SPECS[name], options.device)
        if reason:
            skipped[name] = reason
            continue
        start = time.perf_counter()
        try:
            variants.append(warm_up(build_variant(name, bench), bench))
        except Exception as error:  # noqa: BLE001 - one variant that fails must not cost a rented GPU's whole run
            skipped[name] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        say(f"{name}: {skipped.get(name, f'warm after {time.perf_counter() - start:.0f} s')}")
    graphs = counters["stats"]["unique_graphs"]
    floor = []
    for number in range(options.rounds):
        for variant in variants if number % 2 == 0 else variants[::-1]:
            variant.prepare(number)
            variant.times.append(milliseconds(variant.step, options.device))
            variant.prepare(0)  # gradients go before the next one's turn
        floor.append(milliseconds(lambda number=number: work(number), options.device))  # type: ignore[misc]
        took = ", ".join(f"{variant.name} {variant.times[-1]:,.0f}" for variant in variants)
        say(f"round {number + 1} of {options.rounds}, ms: {took}")  # so that a run cut short is not lost
    tokens, expanded = (
        sum(b.input_ids.numel() for step in steps for b in step) for steps in (bench.steps, bench.expanded)
    )
    new_graphs = counters["stats"]["unique_graphs"] - graphs
    return Result(variants, skipped, floor, formula, new_graphs, expanded / tokens, difference)


def warm_up(variant: Variant, bench: Bench) -> Variant:
    """Run until everything is compiled and cached, then once more for the memory."""
    for _ in range(bench.options.warmup):
        seen: set[tuple[int, ...]] = set()
        for number, batches in enumerate(variant.steps):
            shapes = {batch.shape for batch in batches}
            if not shapes <= seen and (SPECS[variant.name].compiled or not seen):
                variant.prepare(number)
                variant.step()
            seen |= shapes
    measure_memory(variant, bench)
    variant.prepare(0)
    return variant


# --- printing -------------------------------------------------------------------------------------------------------


def ratio(variants: list[Variant], name: str, to: str) -> tuple[float, float, float] | None:
    """Lower quartile, median and upper quartile over rounds of the ratio within a round."""
    times = {variant.name: variant.times for variant in variants}
    if name not in times or to not in times:
        return None
    ratios = [a / b for a, b in zip(times[name], times[to], strict=True)]
    if len(ratios) == 1:
        return (ratios[0],) * 3
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


REFERENCES = ("peft_lora_r64", "peft_lora_r64_scored", "peft_lora_r64_compiled", "mote", "axolotl_kernels_r64_liger")


def table(result: Result, title: str) -> Table:
    references = [name for name in REFERENCES if name in {variant.name for variant in result.variants}]
    out = Table(title=title, title_justify="left", caption_justify="left")
    out.add_column("variant", no_wrap=True)
    for column in (
        "median ms",
        "min ms",
        "max ms",
        "GiB",
        *(f"x {name.removeprefix('peft_lora_')}" for name in references),
    ):
        out.add_column(column, justify="right")
    for variant in result.variants:
        numbers = (statistics.median(variant.times), min(variant.times), max(variant.times))
        memory = "-" if variant.memory is None else f"{variant.memory:.2f}"
        found = [ratio(result.variants, variant.name, name) for name in references]
        ratios = [f"{middle:.3f} ({low:.2f}-{high:.2f})" for low, middle, high in filter(None, found)]
        out.add_row(variant.name, *(f"{n:,.1f}" for n in numbers), memory, *ratios)
    return out


def as_json(result: Result, options: argparse.Namespace, machine: str) -> dict[str, Any]:
    rows = [
        {
            "variant": variant.name,
            "median_ms": statistics.median(variant.times),
            "min_ms": min(variant.times),
            "max_ms": max(variant.times),
            "memory_gib": variant.memory,
        }
        for variant in result.variants
    ]
    names = [variant.name for variant in result.variants]
    found = {to: {name: ratio(result.variants, name, to) for name in names} for to in REFERENCES if to in names}
    ratios = {to: {name: three[1] for name, three in of.items() if three} for to, of in found.items()}
    quartiles = {to: {name: [three[0], three[2]] for name, three in of.items() if three} for to, of in found.items()}
    return {
        "device": "cpu" if options.device == "cpu" else torch.cuda.get_device_name(),
        "rows": rows,
        "skipped": result.skipped,
        "ratios": ratios,
        "quartiles": quartiles,
        "matmul_floor_ms": statistics.median(result.floor),
        "matmul_floor_formula": result.floor_formula,
        "expanded_token_ratio": result.token_ratio,
        "graphs_compiled_while_timing": result.new_graphs,
        "masked_loras_relative_difference": result.masked_difference,
        "machine": machine,
        "size": options.size,
        "layout": options.layout,
        "checkpointing": options.checkpointing,
        "rounds": options.rounds,
    }


def describe_machine(device: str) -> str:
    """Processor or GPU, and the releases that decide about speed."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "model name" in (text := cpuinfo.read_text(encoding="utf-8")):
        name = text.partition("model name")[2].partition(":")[2].partition("\n")[0].strip()
    return f"{name}, {torch.get_num_threads()} threads, {versions}"


def show(result: Result, options: argparse.Namespace, machine: str, console: Console) -> None:
    size = SIZES[options.size]
    tokens = f"{size.rows} chains of {size.tokens} tokens"
    if size.shape is None:
        tokens = f"{size.rows} real chains a step, {options.layout}"
    elif options.layout == "packed":
        tokens = f"{size.tokens} packed tokens of {size.rows} chains"
    saved = "gradient checkpointing" if options.checkpointing else "no gradient checkpointing"
    console.print(table(result, f"{options.size}, {tokens}, {saved}, {options.rounds} rounds\n{machine}"))
    for name, reason in result.skipped.items():
        console.print(f"skipped {name}: {reason}")
    console.print(f"matmul floor: {statistics.median(result.floor):,.1f} ms ({result.floor_formula})")
    console.print(f"expanded: {result.token_ratio:.2f} times the tokens of one pass")
    console.print(f"graphs compiled while timing: {result.new_graphs}")
    console.print(f"masked_loras and mote: relative difference of the loss {result.masked_difference:.1e}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=list(SIZES), help="default: smollm2 on the CPU, llama-3.1-8b on cuda")
    parser.add_argument("--layout", choices=["rows", "packed"], help="default: as the size has it")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="default: as the size has it")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; 0: as torch has it; default: 1")
    parser.add_argument("--rounds", type=int, default=13, help="default: 13, on the CPU every chain once")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--variants", default=",".join(SPECS), help="comma-separated; default: all")
    parser.add_argument("--compile-backend", default="inductor")
    parser.add_argument("--json", action="store_true", help="JSON on standard output, the table on standard error")
    options = parser.parse_args(arguments)
    options.size = options.size or ("llama-3.1-8b" if options.device == "cuda" else "smollm2")
    options.layout = options.layout or SIZES[options.size].layout
    if options.checkpointing is None:
        options.checkpointing = SIZES[options.size].checkpointing
    options.variants = options.variants.split(",")
    if unknown := set(options.variants) - set(SPECS):
        parser.error(f"--variants must be among {', '.join(SPECS)}; got {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    """Measure and print; 1 if a variant failed that should run here."""
    options = parse()
    progress = Console(stderr=True)
    result = run(options, progress.print)
    machine = describe_machine(options.device)
    show(result, options, machine, Console(stderr=options.json, width=160))
    if options.json:
        print(json.dumps(as_json(result, options, machine), indent=2))
    return int(any(reason.startswith("failed") for reason in result.skipped.values()))


if __name__ == "__main__":
    sys.exit(main())
