"""What must hold for the step-routed model of any family: every oracle computes one thing in two ways.

An oracle returns how far the two ways are apart, relative to the largest logit. ``judge`` turns that, or the error
raised, into an outcome. Where an oracle fails, the base model alone is asked the same; if it fails too, the fault is
its own.
"""

from __future__ import annotations

import re
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from kit import STEPS, naive_step_ids, randomize, tiny_tokenizer
from peft import PeftModel
from tiny import VOCABULARY, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LogitsProcessor, LogitsProcessorList

from axolotl_mote.export import export_adapter
from axolotl_mote.generation import load_mote
from axolotl_mote.model.adapter import add_mote_adapter, mote_model
from axolotl_mote.model.attention import prepare_attention
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.loss import scored_positions, shift
from axolotl_mote.model.selfcheck import check_training
from axolotl_mote.training.compat import find_linear_layers

TOLERANCE = 1e-4
"""Largest difference that counts as rounding, in float32 and relative to the largest logit (loss, gradient)."""

MARKER_IDS = list(range(VOCABULARY, VOCABULARY + 2 * len(STEPS)))
PATTERNS = [(1,), (2,), (1, 2)]
"""The sets of steps that step dropout can drop before the answer, the third step."""

Rows = list[list[int]]


# --- outcomes -------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """One cell: right, refused, base (the base model cannot do it), WRONG, RAW (an error nobody wrote), not built."""

    kind: str
    detail: str = ""
    difference: float | None = None


class Unequal(AssertionError):
    """An oracle found something wrong that is no difference of numbers."""


def judge(oracle: Callable[[], float], base: Callable[[], float] | None = None) -> Outcome:
    """Run an oracle; where it fails, run the same on the base model alone."""
    try:
        difference = oracle()
        if difference <= TOLERANCE:
            return Outcome("right", difference=difference)
        outcome = Outcome("WRONG", difference=difference)
    except Unequal as error:
        outcome = Outcome("WRONG", str(error))
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the outcome)
        outcome = raised(error)
        if outcome.kind == "refused":
            return outcome
    fault = _fault(base) if base is not None else None
    return outcome if fault is None else Outcome("base", fault)


def _fault(base: Callable[[], float]) -> str | None:
    """What the base model does wrong; None if it is right."""
    try:
        difference = base()
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the outcome)
        return raised(error).detail
    return None if difference <= TOLERANCE else f"off by {difference:.1e}"


def raised(error: Exception) -> Outcome:
    """Refused: an error with a message of ours, raised by our code; anything else is raw."""
    frames = traceback.extract_tb(error.__traceback__)
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}".replace(tempfile.gettempdir(), "TMP")
    message = re.sub(r"TMP/\w+", "FOLDER", message)
    ours = "/axolotl_mote/" in frames[-1].filename and isinstance(error, (ValueError, NotImplementedError))
    if ours:
        return Outcome("refused", message)
    places = [f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in frames]
    inside = [p for p, f in zip(places, frames, strict=True) if "/axolotl_mote/" in f.filename]
    return Outcome("RAW", f"{message} @ {places[-1]}" + (f" from {inside[-1]}" if inside else ""))


def _distance(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where one alone is finite."""
    one, other = one.detach().float(), other.detach().float()
    finite = torch.isfinite(one) & torch.isfinite(other)
    if not torch.equal(torch.isfinite(one), torch.isfinite(other)) or not finite.any():
        return float("inf")
    return float((one[finite] - other[finite]).abs().max() / other[finite].abs().max().clamp(min=1e-3))


# --- models and chains ----------------------------------------------------------------------------------------------


def mote_config(model: Any, **kwargs: Any) -> MoteConfig:
    """Experts on every linear layer, as ``lora_target_linear: true`` means."""
    targets = sorted(find_linear_layers(model))
    values = {"r": 2, "lora_alpha": 4, "steps": list(STEPS), "marker_ids": MARKER_IDS, "question_routing": "mean"}
    return MoteConfig(**{"target_modules": targets, **values, **kwargs})


def routed(family: str, *, step_dropout: bool = False, base: Any = None, **kwargs: Any) -> PeftModel:
    """A tiny model, or a given one, with random experts, all different; checked as training checks it."""
    base = tiny_model(family) if base is None else base
    if step_dropout:
        prepare_attention(base)
    model = add_mote_adapter(base, mote_config(base, **kwargs)).eval()
    routing = randomize(model).routing
    routing.step_dropout = (0.5, 0.5) if step_dropout else ()
    check_training(model)
    routing.step_dropout = ()
    return model


def chain(*sizes: int, seed: int) -> list[int]:
    """A chain; each number is a count of words: of the question, then of each step; 0 leaves the step out."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for step, count in enumerate(sizes):
        words = torch.randint(3, 256, (count,), generator=generator).tolist()
        ids += words if step == 0 else [MARKER_IDS[2 * step - 2], *words, MARKER_IDS[2 * step - 1]] if count else []
    return [*ids, 2]


ROWS = [chain(9, 6, 4, 7, seed=1), chain(6, 4, 0, 9, seed=3), chain(8, 0, 0, 5, seed=4)]


def plain(rows: Rows) -> Rows:
    """The same rows without markers, for the base model."""
    return [[token if token < VOCABULARY else token - 200 for token in row] for row in rows]


def batch(rows: Rows, layout: str) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """Rows as one batch, padded left or right, or packed into one row; and (row, column) where each starts."""
    if layout == "packed":
        starts = [(0, sum(map(len, rows[:number]))) for number in range(len(rows))]
        ids = [token for row in rows for token in row]
        positions = [position for row in rows for position in range(len(row))]
        return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}, starts
    width = max(map(len, rows)) + 2

    def padded(values: Rows) -> Tensor:
        fills = [[0] * (width - len(row)) for row in values]
        return torch.tensor([f + r if layout == "left" else r + f for f, r in zip(fills, values, strict=True)])

    starts = [(number, width - len(row) if layout == "left" else 0) for number, row in enumerate(rows)]
    return {"input_ids": padded(rows), "attention_mask": padded([[1] * len(row) for row in rows])}, starts


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    """Logits of one row by itself, without cache, (T, V)."""
    result: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return result


# --- training -------------------------------------------------------------------------------------------------------


def batched_equals_alone(model: Any, rows: Rows, layout: str) -> float:
    """Rows in one batch, or packed into one, have the logits that each has by itself."""
    inputs, starts = batch(rows, layout)
    with torch.no_grad():
        together = model(**inputs, use_cache=False).logits
    return max(
        _distance(together[row, start : start + len(ids)], logits(model, ids))
        for ids, (row, start) in zip(rows, starts, strict=True)
    )


@torch.no_grad()
def runs(model: Any, rows: Rows) -> float:
    """The model runs on a batch at all."""
    model(**batch(rows, "right")[0], use_cache=False)
    return 0.0


def loss_equals_cross_entropy(model: PeftModel) -> float:
    """The loss that training uses, in chunks too, is the cross-entropy of the logits that the model itself returns."""
    inputs, _ = batch(ROWS, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    targets = shift(labels, -100)
    with torch.no_grad():
        expected = _cross_entropy(model(**inputs, use_cache=False).logits, targets)
        losses = [model(**inputs, targets=targets).loss]
        with mock.patch("axolotl_mote.model.loss.chunk_size", return_value=16):
            losses.append(model(**inputs, targets=targets, scored=scored_positions(labels, 8)).loss)
    return max(_distance(loss, expected) for loss in losses)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def masked_equals_shortened(model: PeftModel, layout: str) -> float:
    """Under step dropout every token has the logits that it has where the dropped steps were never written."""
    model.train()
    inputs, starts = batch(ROWS, layout)
    worst = 0.0
    for pattern in PATTERNS:
        with torch.no_grad():
            _drop(model, pattern)
            masked = model(**inputs, use_cache=False).logits
        _drop(model, ())
        for ids, (row, start) in zip(ROWS, starts, strict=True):
            for kept, own in _shortened(ids, model, pattern):
                alone = logits(model, [ids[i] for i in kept])
                there = masked[row, [start + kept[i] for i in own]]
                worst = max(worst, _distance(there, alone[own]))
    return worst


def _drop(model: PeftModel, pattern: tuple[int, ...]) -> None:
    """Drop exactly these steps in every forward."""
    mote_model(model).routing.step_dropout = tuple(float(step in pattern) for step in (1, 2)) if pattern else ()


def _shortened(ids: list[int], model: PeftModel, pattern: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Indices of the tokens of each shortened chain, and which of them it stands for.

    One chain without the dropped steps, and one for each dropped step that ends in it, since it is still trained.
    """
    steps = naive_step_ids(ids, model.peft_config["default"])
    kept = [i for i, step in enumerate(steps) if step not in pattern]
    chains = [(kept, list(range(len(kept))))]
    for dropped in pattern:
        own = [i for i, step in enumerate(steps) if step == dropped]
        if own:
            before = [i for i in kept if i < own[0]]
            chains.append((before + own, list(range(len(before), len(before) + len(own)))))
    return chains


def gradients_follow_steps(model: PeftModel) -> float:
    """Gradients are those of the model's own logits; every expert of every adapted layer gets one if its step is there.

    An expert whose step is not in the batch gets exactly none.
    """
    model.train()
    row = chain(9, 12, 0, 14, seed=7)  # without guidance
    ids, targets = torch.tensor([row]), torch.tensor([[*row[1:], -100]])
    found = []
    for training in (True, False):
        model.zero_grad()
        if training:
            model(input_ids=ids, targets=targets).loss.sum().backward()
        else:
            _cross_entropy(model(input_ids=ids, use_cache=False).logits, targets).sum().backward()
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})
    r, idle, leaking = model.peft_config["default"].r, [], []
    for name, gradient in found[0].items():
        if "lora_A" in name or "lora_B" in name:
            blocks = gradient.split(r, dim=0 if "lora_A" in name else 1)
            idle += [name] * any(not blocks[k].any() for k in (0, 2, 3))
            leaking += [name] * bool(blocks[1].any())
    for fault, names in (("get no gradient", idle), ("get a gradient of an absent step", leaking)):
        if names:
            raise Unequal(f"{len(names)} adapter weights {fault}, such as {names[0]}")
    return _distance(*(torch.cat([g.flatten() for n, g in one.items() if "lora_" in n]) for one in found))


# --- one step's expert, no adapter, another process -----------------------------------------------------------------


def experts_keep_to_their_step(model: PeftModel) -> float:
    """Another expert of the second step leaves every token before that step as it is, and changes those in it."""
    ids = ROWS[0]
    before = logits(model, ids)
    r = model.peft_config["default"].r
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter[:, r : 2 * r] *= -2
    after = logits(model, ids)
    start = ids.index(MARKER_IDS[2])
    if _distance(before[start:], after[start:]) <= TOLERANCE:
        raise Unequal("another expert changes nothing")
    return _distance(before[:start], after[:start])


def later_tokens_change_nothing(model: Any) -> float:
    """Other tokens at the end of a row leave the logits before them as they are: the model is causal."""
    ids = plain(ROWS)[0]
    other = [*ids[:20], *ids[:2:-1]][: len(ids)]
    return _distance(logits(model, other)[:20], logits(model, ids)[:20])


def disabled_is_the_base(family: str) -> float:
    """With the adapter disabled the logits are those that the base model had before, bit for bit."""
    base, ids = tiny_model(family), plain(ROWS)[0]
    before = logits(base, ids)
    with routed(family, base=base).disable_adapter():
        after = logits(base, ids)
    return 0.0 if torch.equal(after, before) else max(_distance(after, before), 2 * TOLERANCE)


def save_trained(family: str, model: PeftModel, folder: Path) -> None:
    """Write ``base`` and ``adapter`` into a folder, as they lie there after training."""
    tiny_model(family).save_pretrained(folder / "base")
    model.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")


def loaded_is_saved(family: str, model: PeftModel, folder: Path) -> float:
    """``load_mote`` gives the model that was saved, its adapter bit for bit; it is too late to refuse anything."""
    save_trained(family, model, folder)
    try:
        loaded, _ = load_mote(folder / "adapter", folder / "base", dtype=torch.float32, device="cpu")
    except ValueError as error:
        raise Unequal(f"what was trained cannot be loaded: {error}".replace(str(folder), "FOLDER")) from error
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if "lora_" in name and not torch.equal(tensor, state[name]):
            raise Unequal(f"{name} is another after loading")
    return _distance(logits(loaded, ROWS[0]), logits(model, ROWS[0]))


def base_loaded_is_saved(base: Any, folder: Path) -> float:
    """The base model alone, saved and loaded."""
    base.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = plain(ROWS)[0]
    return _distance(logits(loaded, ids), logits(base, ids))


def quantized_base(base: Any, folder: Path) -> Any:
    """A base model in 4 bits, computing in float32."""
    base.save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    if not any(isinstance(module, Linear4bit) for module in model.modules()):
        raise ValueError("bitsandbytes quantizes no layer of this family")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a kernel that takes no layers as small as these
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def exported_is_routed(family: str, model: PeftModel, folder: Path) -> float:
    """The export, loaded by plain PEFT and switched at every step, gives the logits of the step-routed model."""
    save_trained(family, model, folder)
    report = export_adapter(folder / "adapter", folder / "out", folder / "base", probes=ROWS, device="cpu")
    scale = max(float(logits(model, row)[:, :VOCABULARY].abs().max()) for row in ROWS)
    return float(report.largest_difference) / scale


# --- generation -----------------------------------------------------------------------------------------------------


class _Follow(LogitsProcessor):
    """Make greedy decoding write the given rows."""

    def __init__(self, rows: Rows, begin: int) -> None:
        self.rows, self.begin = torch.tensor(rows), begin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self.rows[:, input_ids.shape[1] - self.begin]
        return torch.full_like(scores, float("-inf")).scatter(1, wanted[:, None], 0.0)


def cached_equals_full(model: Any, rows: Rows, **options: Any) -> float:
    """Decoding with a cache, prompts padded on the left, gives each row the logits of one forward without cache."""
    new = 14
    prompts, tails = [row[:-new] for row in rows], [row[-new:] for row in rows]
    inputs, _ = batch(prompts, "left")
    width = inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs,
        logits_processor=LogitsProcessorList([_Follow(tails, width)]),
        max_new_tokens=new,
        **_decoding(),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    cached = torch.stack(out.logits, dim=1)
    return max(
        _distance(cached[number], logits(model, row)[len(row) - new - 1 : -1]) for number, row in enumerate(rows)
    )


@torch.no_grad()
def continued_equals_full(model: Any, rows: Rows) -> float:
    """A row fed in pieces, each with the cache of those before it, has the logits of one forward without cache."""
    ids, cache, pieces = torch.tensor(rows[:1]), None, []
    for piece in ids.split([12, 6, 1, ids.shape[1] - 19], dim=1):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits[0])
    return _distance(torch.cat(pieces), logits(model, rows[0]))


def beams_equal_full(model: Any, rows: Rows) -> float:
    """The score of a beam, found with a cache, is the sum of its log probabilities in one forward without cache."""
    new = 6
    prompts = [row[:-new] for row in rows]
    inputs, starts = batch(prompts, "left")
    out = model.generate(
        **inputs, max_new_tokens=new, **_decoding(), num_beams=3, output_scores=True, return_dict_in_generate=True
    )
    worst = 0.0
    for score, sequence, (_, start) in zip(out.sequences_scores, out.sequences, starts, strict=True):
        ids = sequence[start:].tolist()
        own = logits(model, ids).log_softmax(-1)[-new - 1 : -1]
        expected = own.gather(1, sequence[-new:, None]).sum() / new
        worst = max(worst, _distance(score, expected))
    return worst


def _decoding() -> dict[str, Any]:
    return {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
