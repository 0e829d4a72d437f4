"""Time of one training step: MoTE beside plain LoRA, axolotl's fused kernels and the usual ways to run several LoRAs.

    python tests/bench/train_step.py                                    # CPU: SmolLM2, 2 x 256 tokens, float32
    python tests/bench/train_step.py --device cuda --json > step.json   # Llama-3.1-8B shape, 8,192 packed tokens, bf16
    python tests/bench/train_step.py --size tiny --layout packed --checkpointing      # the GPU's path, on any machine

What is timed: forward, loss and backward. No optimizer, no data loading. The loss is the same for all: the decoder's
hidden states go through our `token_losses` (chunks of tokens), also for plain LoRA and for axolotl's kernels, so that
the adapter is what differs. Adapters have the dtype of the base model. Every variant sees the same tokens; markers are
the last rows of the vocabulary, which exist in the table. MoTE trains rows of its own for them and pays for it here;
plain LoRA does not train them.

How: the frozen base weights exist once and every variant's model refers to them, so all variants fit side by side. They
take turns round by round (A B C, C B A, ...), and the ratios are medians over rounds of the ratio within a round, so
that what else the machine does hits all alike. Memory is what one step of a variant needs on its own: frozen weights,
its adapter, and the peak above them. It is told on a GPU only: on the CPU the allocator keeps what
earlier steps freed, and the resident size tells nothing.

`expanded` is the paper's alternative to step dropout: the seven chains that a row stands for, as ordinary rows through
MoTE without step dropout. Its time is that of all seven, for the same original rows as everywhere else.
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
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from axolotl_mote.chain.steps import IGNORE_INDEX
from axolotl_mote.model.adapter import add_mote_adapter, mote_model
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.loss import shift, token_losses

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["analysis", "guidance", "response"]
SHARES = (0.23, 0.17, 0.10, 0.50)  # question and steps by tokens, measured on the full seed chains
DROPOUT = (0.3, 0.3)
RANK = 16  # of one expert; four of them make 64
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FULL = (1, 2, 3)
EXPANDED = ((1,), (1, 2), (2,), (2, 3), (3,), (1, 3), FULL)
"""The steps that follow the question in the paper's data sets: (x, x_a), (x, x_a, x_g), ..., (x, x_a, x_g, A)."""


@dataclass(frozen=True)
class Size:
    """A model and the tokens of one step; a model without `shape` is read from `models/`."""

    shape: dict[str, Any] | None
    tokens: int
    """Of one row; a packed batch is one row."""
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


# --- tokens ---------------------------------------------------------------------------------------------------------

Document = tuple[Tensor, ...]
"""Question, analysis, guidance, response; the steps with their markers."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch; position_ids are None where every row is one document."""

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor | None


def make_documents(lengths: list[int], vocab: int, marker_ids: list[int]) -> list[Document]:
    """Random full chains of these lengths."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in lengths:
        sizes = [max(3, round(share * length)) for share in SHARES[:-1]]
        parts = torch.randint(3, vocab - 6, (length,), generator=generator).split([*sizes, length - sum(sizes)])
        for part, start, end in zip(parts[1:], marker_ids[0::2], marker_ids[1::2], strict=True):
            part[0], part[-1] = start, end
        documents.append(parts)
    return documents


def document_lengths(tokens: int, count: int) -> list[int]:
    """Uneven lengths that add up: half of the tokens evenly, half at random."""
    cuts = torch.rand(count, generator=torch.Generator().manual_seed(1))
    lengths = (tokens / count / 2 + cuts / cuts.sum() * tokens / 2).long()
    lengths[-1] += tokens - lengths.sum()
    return cast("list[int]", lengths.tolist())


def row_of(document: Document, steps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Tokens and labels of the chain that holds only these steps."""
    ids = torch.cat([document[0], *(document[step] for step in steps)])
    labels = ids.clone()
    labels[: len(document[0])] = IGNORE_INDEX
    return ids, labels


def make_batches(rows: list[tuple[Tensor, Tensor]], packed: bool, limit: int, device: str) -> list[Batch]:
    """Rows of one length stacked as they come, or packed into sequences of at most ``limit`` tokens; never padded."""
    groups: list[list[tuple[Tensor, Tensor]]] = []
    for row in rows:
        together = groups[-1] if groups else []
        fits = sum(len(ids) for ids, _ in together) + len(row[0]) <= limit
        same = bool(together) and len(together[0][0]) == len(row[0])
        if not together or not (fits if packed else same):
            groups.append([])
        groups[-1].append(row)
    batches = []
    for group in groups:
        ids, labels = ([row[part] for row in group] for part in (0, 1))
        join = (lambda parts: torch.cat(parts).unsqueeze(0)) if packed else torch.stack
        positions = join([torch.arange(len(one)) for one in ids]).to(device) if packed else None
        batches.append(Batch(join(ids).to(device), shift(join(labels), IGNORE_INDEX).to(device), positions))
    return batches


# --- models ---------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What all variants share: the frozen model and the tokens."""

    options: argparse.Namespace
    base: PreTrainedModel
    marker_ids: list[int]
    batches: list[Batch] = field(default_factory=list)
    expanded: list[Batch] = field(default_factory=list)

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
        base = AutoModelForCausalLM.from_pretrained(ROOT / "models/SmolLM2-135M-Instruct", dtype=dtype)
        base = base.to(options.device)
    else:
        with torch.device(options.device):
            base = AutoModelForCausalLM.from_config(LlamaConfig(**size.shape), dtype=dtype)
    base.requires_grad_(False)
    base.config.use_cache = False
    vocab = base.config.vocab_size
    bench = Bench(options, base, list(range(vocab - 6, vocab)))
    packed = options.layout == "packed"
    lengths = document_lengths(size.tokens, size.rows) if packed else [size.tokens] * size.rows
    documents = make_documents(lengths, vocab, bench.marker_ids)
    bench.batches = make_batches([row_of(one, FULL) for one in documents], packed, size.tokens, options.device)
    # Document by document when packed, step pattern by step pattern otherwise: rows of one length stand together.
    pairs = itertools.product(documents, EXPANDED) if packed else ((d, s) for s in EXPANDED for d in documents)
    bench.expanded = make_batches([row_of(*pair) for pair in pairs], packed, size.tokens, options.device)
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
    compiled: bool = False
    expanded: bool = False
    needs_cuda: str = ""
    """Why the variant needs a GPU; empty where it does not."""
    needs_package: str = ""


NO_BACKWARD = "flex_attention has no backward on the CPU"
SPECS = {
    "peft_lora_r16": Spec(peft_lora(16)),
    "peft_lora_r32": Spec(peft_lora(32)),
    "peft_lora_r64": Spec(peft_lora(64)),
    "mote": Spec(mote()),
    "peft_lora_r64_compiled": Spec(peft_lora(64), compiled=True),
    "mote_compiled": Spec(mote(), compiled=True),
    "axolotl_kernels_r64_liger": Spec(
        lambda bench: axolotl_kernels(peft_lora(64)(bench)),
        needs_cuda="axolotl's and Liger's kernels are Triton programs for a GPU",
        needs_package="liger_kernel",
    ),
    "mote_dropout_flex_compiled": Spec(mote("flex_attention"), compiled=True, needs_cuda=NO_BACKWARD),
    "mote_dropout_dense": Spec(mote("sdpa")),
    "mote_dropout_flex": Spec(mote("flex_attention"), needs_cuda=NO_BACKWARD),
    "mote_dropout_varlen": Spec(mote("mote_varlen")),
    "mote_dropout_varlen_compiled": Spec(
        mote("mote_varlen"), compiled=True, needs_cuda="the CPU has only a reference loop for it"
    ),
    "mote_dropout_varlen_fa2": Spec(
        mote("flash_attention_2"), needs_cuda="flash-attn needs a GPU", needs_package="flash_attn"
    ),
    "masked_loras": Spec(lambda bench: replace_linears(mote()(bench), MaskedLoras)),
    "token_router": Spec(lambda bench: replace_linears(mote()(bench), TokenRouter)),
    "expanded": Spec(mote(), expanded=True),
}


def reason_to_skip(spec: Spec, device: str) -> str | None:
    """Why a variant cannot run here, or None."""
    if spec.needs_cuda and device != "cuda":
        return spec.needs_cuda
    if spec.needs_package and importlib.util.find_spec(spec.needs_package) is None:
        return f"{spec.needs_package} is not installed"
    return None


def losses(model: PeftModel, batch: Batch, routed: bool) -> Tensor:
    """Negative log-likelihood of every target, (B, T), by the one path that all variants share."""
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if routed:
        return cast(Tensor, model(**inputs, targets=batch.targets).loss)
    causal: Any = model.get_base_model()
    hidden = causal.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return token_losses(hidden, batch.targets, causal.get_output_embeddings(), causal.config.vocab_size)


@dataclass
class Variant:
    """A model with its adapter, ready to run, and what was measured of it."""

    name: str
    model: PeftModel
    batches: list[Batch]
    memory: float | None = None
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tuner = mote_model(self.model)

    def prepare(self, round_number: int) -> None:
        """What happens between two steps and is not timed."""
        for parameter in self.model.parameters():
            parameter.grad = None
        if self.tuner is not None:
            self.tuner.routing.step = round_number  # other steps are dropped in every round

    def step(self) -> None:
        """Forward, loss and backward of all micro-batches."""
        total = sum(batch.input_ids.numel() for batch in self.batches)
        for batch in self.batches:
            (losses(self.model, batch, self.tuner is not None).sum() / total).backward()


def build_variant(name: str, bench: Bench) -> Variant:
    spec, options = SPECS[name], bench.options
    model = spec.build(bench)
    if spec.compiled:
        for layer in cast(Any, model.get_base_model()).get_decoder().layers:
            layer.compile(backend=options.compile_backend)
    return Variant(name, model, bench.expanded if spec.expanded else bench.batches)


@torch.no_grad()
def check_masked_loras() -> float:
    """Refuse to time a baseline that computes something else: masked LoRAs must give MoTE's losses.

    Returns:
        Largest difference of a token's loss on a tiny packed batch in float32.
    """
    bench = load_bench(argparse.Namespace(size="tiny", device="cpu", layout="packed", checkpointing=False))
    gated, masked = mote()(bench), replace_linears(mote()(bench), MaskedLoras)
    plain = peft_lora(16)(bench)
    batch = bench.batches[0]
    expected = losses(gated, batch, True)
    difference = float((losses(masked, batch, True) - expected).abs().max())
    if not difference <= 1e-4 or float((losses(plain, batch, False) - expected).abs().max()) <= 1e-4:
        raise RuntimeError(f"masked_loras must equal mote, and plain LoRA must not; losses differ by {difference}.")
    return difference


# --- measuring ------------------------------------------------------------------------------------------------------


def milliseconds(work: Callable[[], None], device: str) -> float:
    """Time of one call, by events on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    before = time.perf_counter()
    work()
    return (time.perf_counter() - before) * 1e3


def measure_memory(variant: Variant, bench: Bench) -> None:
    """Run one step; on a GPU note its memory as if the variant were alone: frozen weights, adapter, peak above them."""
    variant.prepare(0)
    if bench.options.device != "cuda":
        variant.step()
        return
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    variant.step()
    frozen = {id(p): p for p in bench.base.parameters()}.values()
    trained = [p for p in variant.model.parameters() if p.requires_grad]
    own = sum(p.nbytes for p in frozen) + sum(p.nbytes for p in trained)
    variant.memory = (own + torch.cuda.max_memory_allocated() - before) / 2**30


def matmul_floor(bench: Bench) -> tuple[Callable[[], None], str]:
    """The frozen matrix products alone, as a job to time, and the formula in words.

    For every frozen linear layer W of the decoder: x W^T forward, once more if activations are recomputed, and g W for
    the gradient of its input. The head likewise; it is recomputed where the loss runs in chunks.
    """
    base: Any = bench.base
    weights = [module.weight for module in base.get_decoder().layers.modules() if isinstance(module, nn.Linear)]
    head = base.get_output_embeddings().weight
    tokens = sum(batch.input_ids.numel() for batch in bench.batches)
    forwards = 2 if bench.options.checkpointing else 1
    head_forwards = 2 if tokens > max(256, 2**27 // base.config.vocab_size) else 1
    jobs = [(weight, forwards) for weight in weights] + [(head, head_forwards)]
    widths = {width for weight, _ in jobs for width in weight.shape}
    rows = {width: torch.randn(tokens, width, device=head.device, dtype=head.dtype) for width in widths}

    @torch.no_grad()
    def work() -> None:
        for weight, times in jobs:
            for _ in range(times):
                F.linear(rows[weight.shape[1]], weight)
            rows[weight.shape[0]] @ weight

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
    difference = check_masked_loras()
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
            variant.prepare(options.warmup + number)
            variant.times.append(milliseconds(variant.step, options.device))
            variant.prepare(0)  # gradients go before the next one's turn
        floor.append(milliseconds(work, options.device))
        took = ", ".join(f"{variant.name} {variant.times[-1]:,.0f}" for variant in variants)
        say(f"round {number + 1} of {options.rounds}, ms: {took}")  # so that a run cut short is not lost
    tokens, expanded = (sum(b.input_ids.numel() for b in batches) for batches in (bench.batches, bench.expanded))
    new_graphs = counters["stats"]["unique_graphs"] - graphs
    return Result(variants, skipped, floor, formula, new_graphs, expanded / tokens, difference)


def warm_up(variant: Variant, bench: Bench) -> Variant:
    """Run until everything is compiled and cached, then once more for the memory."""
    for number in range(bench.options.warmup):
        variant.prepare(number)
        variant.step()
    measure_memory(variant, bench)
    variant.prepare(0)
    return variant


# --- printing -------------------------------------------------------------------------------------------------------


def ratio(variants: list[Variant], name: str, to: str) -> float | None:
    """Median over rounds of the ratio within a round."""
    times = {variant.name: variant.times for variant in variants}
    if name not in times or to not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


REFERENCES = ("peft_lora_r64", "mote", "peft_lora_r64_compiled", "axolotl_kernels_r64_liger")


def table(result: Result, title: str) -> Table:
    references = [name for name in REFERENCES if name in {variant.name for variant in result.variants}]
    out = Table(title=title, title_justify="left", caption_justify="left")
    out.add_column("variant", no_wrap=True)
    for column in ("median ms", "min ms", "max ms", "GiB", *(f"x {name}" for name in references)):
        out.add_column(column, justify="right")
    for variant in result.variants:
        numbers = (statistics.median(variant.times), min(variant.times), max(variant.times))
        memory = "-" if variant.memory is None else f"{variant.memory:.2f}"
        ratios = (ratio(result.variants, variant.name, name) for name in references)
        out.add_row(variant.name, *(f"{n:,.1f}" for n in numbers), memory, *(f"{r:.3f}" for r in ratios if r))
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
    ratios = {to: {name: ratio(result.variants, name, to) for name in names} for to in REFERENCES if to in names}
    return {
        "device": "cpu" if options.device == "cpu" else torch.cuda.get_device_name(),
        "rows": rows,
        "skipped": result.skipped,
        "ratios": ratios,
        "matmul_floor_ms": statistics.median(result.floor),
        "matmul_floor_formula": result.floor_formula,
        "expanded_token_ratio": result.token_ratio,
        "graphs_compiled_while_timing": result.new_graphs,
        "masked_loras_largest_difference": result.masked_difference,
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
    tokens = f"{size.tokens} packed tokens of {size.rows} documents"
    if options.layout == "rows":
        tokens = f"{size.rows} x {size.tokens} tokens"
    saved = "gradient checkpointing" if options.checkpointing else "no gradient checkpointing"
    console.print(table(result, f"{options.size}, {tokens}, {saved}, {options.rounds} rounds\n{machine}"))
    for name, reason in result.skipped.items():
        console.print(f"skipped {name}: {reason}")
    console.print(f"matmul floor: {statistics.median(result.floor):,.1f} ms ({result.floor_formula})")
    console.print(f"expanded: {result.token_ratio:.2f} times the tokens of one pass")
    console.print(f"graphs compiled while timing: {result.new_graphs}")
    console.print(f"masked_loras and mote: largest difference of a token's loss {result.masked_difference:.1e}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=list(SIZES), help="default: smollm2 on the CPU, llama-3.1-8b on cuda")
    parser.add_argument("--layout", choices=["rows", "packed"], help="default: as the size has it")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="default: as the size has it")
    parser.add_argument("--rounds", type=int, default=7)
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
