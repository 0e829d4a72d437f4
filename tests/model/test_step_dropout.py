"""Step dropout is exact: the masked forward equals the physically shortened chains, in logits and in gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kit import FAMILIES, MARKER_IDS, STEPS, VOCABULARY, base_model, chain, mote, mote_config, randomize, takes
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BartConfig

from axolotl_mote.model import attention
from axolotl_mote.model.adapter import add_mote_adapter, mote_model
from axolotl_mote.model.attention import FLASH, VARLEN, SegmentsHolder, check_attention, prepare_attention
from axolotl_mote.model.compat import ALL_ATTENTION_FUNCTIONS
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.masks import Segments
from axolotl_mote.model.routing import step_ids_from_tokens

PATTERNS = [(1,), (2,), (1, 2)]
BACKENDS = ["sdpa", "eager", "flex_attention", "mote_varlen"]
TRAINABLE = ["sdpa", "eager", "mote_varlen"]  # flex_attention has no backward on the CPU


@pytest.fixture(autouse=True)
def flex_without_compiler() -> Iterator[None]:
    """Run flex_attention eagerly: torch's C++ templates for it fail to compile for shapes that change."""
    with torch.compiler.set_stance("force_eager"):
        yield


def drop(model: PeftModel, pattern: tuple[int, ...]) -> None:
    """Drop exactly these steps in every forward."""
    mote_model(model).routing.step_dropout = tuple(1.0 if step in pattern else 0.0 for step in (1, 2))


def references(tokens: list[int], steps: list[int], pattern: tuple[int, ...]) -> list[list[int]]:
    """Indices of the tokens of each shortened chain: the kept one, and one ending in each dropped step."""
    kept = [i for i, step in enumerate(steps) if step not in pattern]
    chains = [kept]
    for dropped in pattern:
        own = [i for i, step in enumerate(steps) if step == dropped]
        if own:
            chains.append([i for i in kept if i < own[0]] + own)
    return chains


def own_tokens(indices: list[int], steps: list[int], pattern: tuple[int, ...]) -> list[int]:
    """Positions within a shortened chain of the tokens that it stands for: all kept ones, or the dropped step's."""
    last_step = steps[indices[-1]]
    if last_step in pattern:
        return [position for position, i in enumerate(indices) if steps[i] == last_step]
    return list(range(len(indices)))


def largest_difference(model: PeftModel, rows: list[list[int]], pattern: tuple[int, ...], layout: str) -> float:
    """Largest logit difference between the masked forward of rows and all their shortened chains."""
    config = mote_model(model).routing.config
    inputs, offsets = arrange(rows, layout)
    drop(model, pattern)
    with torch.no_grad():
        masked = model(**inputs).logits
        drop(model, ())
        worst = 0.0
        for number, tokens in enumerate(rows):
            steps = step_ids_from_tokens(torch.tensor([tokens]), config)[0].tolist()
            row, start = offsets[number]
            for indices in references(tokens, steps, pattern):
                alone = model(input_ids=torch.tensor([[tokens[i] for i in indices]])).logits[0]
                for position in own_tokens(indices, steps, pattern):
                    difference = masked[row, start + indices[position]] - alone[position]
                    worst = max(worst, float(difference.nan_to_num().abs().max()))
    return worst


def arrange(rows: list[list[int]], layout: str) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """Put rows into one batch, padded left or right, or packed; and say where each starts."""
    if layout == "packed":
        positions = [position for tokens in rows for position in range(len(tokens))]
        starts = [sum(len(other) for other in rows[:number]) for number in range(len(rows))]
        inputs = {
            "input_ids": torch.tensor([[token for row in rows for token in row]]),
            "position_ids": torch.tensor([positions]),
        }
        return inputs, [(0, start) for start in starts]
    length = max(len(tokens) for tokens in rows) + 2
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    offsets = []
    for number, tokens in enumerate(rows):
        start = 0 if layout == "right" else length - len(tokens)
        ids[number, start : start + len(tokens)], mask[number, start : start + len(tokens)] = torch.tensor(tokens), 1
        offsets.append((number, start))
    return {"input_ids": ids, "attention_mask": mask}, offsets


ROWS = [chain(9, 6, 4, 7, seed=1), chain(12, 3, 5, 8, seed=2), chain(6, 4, 0, 9, seed=3), chain(8, 0, 0, 5, seed=4)]


CASES = [
    (family, attention, layout)
    for family in FAMILIES
    for attention in BACKENDS
    for layout in ("left", "right", "packed")
    if (family, attention) != ("gemma2", "mote_varlen")  # soft-capped attention is refused there, see below
    and (layout == "packed" or family not in ("qwen3", "llama_tied"))  # adds nothing to llama
    and (attention != "sdpa" or takes(family, "sdpa"))
]


@pytest.mark.parametrize(("family", "attention", "layout"), CASES)
def test_masked_forward_equals_the_shortened_chains(family: str, attention: str, layout: str) -> None:
    model = mote(family, attention, question_routing="mean").train()
    scale = (
        float(model(input_ids=torch.tensor([ROWS[0]])).logits[..., :VOCABULARY].abs().max())
        if (attention != "flex_attention")
        else 1.0
    )
    for pattern in PATTERNS:
        assert largest_difference(model, ROWS, pattern, layout) < 1e-5 * max(scale, 1.0), pattern


def test_soft_capped_attention_is_refused_where_it_would_be_lost() -> None:
    if not takes("gemma2", "sdpa"):  # then transformers refuses what mote_varlen runs as before any step is dropped
        with pytest.raises(ValueError, match="`sdpa` attention does not support `softcap`"):
            mote("gemma2", "mote_varlen")
        return
    model = mote("gemma2", "mote_varlen").train()
    drop(model, (1,))
    with pytest.raises(NotImplementedError, match="soft-capped"):
        model(input_ids=torch.tensor([ROWS[0]]))


@pytest.mark.parametrize("attention", BACKENDS)
def test_exact_on_a_real_model(attention: str, smollm2_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32, attn_implementation=attention)
    ids = list(range(49152, 49158))
    config = MoteConfig(
        r=4,
        lora_alpha=8,
        steps=STEPS,
        marker_ids=ids,
        question_routing="mean",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = add_mote_adapter(base, config)
    randomize(model, 0.01)
    model.train()
    swap = dict(zip(MARKER_IDS, ids, strict=True))
    rows = [
        [swap.get(token, token * 37) for token in row] for row in (chain(21, 12, 9, 15), chain(14, 7, 8, 10, seed=2))
    ]
    worst = {p: largest_difference(model, rows, p, "packed") for p in PATTERNS}
    if attention in TRAINABLE:
        assert_gradients_match(model, rows, (1, 2))
    with torch.no_grad():
        drop(model, ())
        scale = float(model(input_ids=torch.tensor([rows[0]])).logits[..., :49152].abs().max())
    print(f"{attention}: largest difference by dropped steps {worst} at logit scale {scale:.1f}")
    assert max(worst.values()) < 1e-3


def gradients(model: PeftModel) -> list[Tensor]:
    """Collect and clear the gradients of the adapter."""
    found = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
            parameter.grad = None
    return found


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Relative difference below 1e-4 for every tensor."""
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-7


def assert_gradients_match(model: PeftModel, rows: list[list[int]], pattern: tuple[int, ...]) -> None:
    """The masked forward's gradient equals the sum over the shortened chains, each counting its own tokens."""
    config = mote_model(model).routing.config
    inputs, offsets = arrange(rows, "packed")
    targets = torch.full_like(inputs["input_ids"], -100)
    for (_, start), tokens in zip(offsets, rows, strict=True):
        targets[0, start : start + len(tokens) - 1] = torch.tensor(tokens[1:])
    drop(model, pattern)
    model(**inputs, targets=targets).loss.sum().backward()
    masked = gradients(model)
    drop(model, ())
    for (_, start), tokens in zip(offsets, rows, strict=True):
        steps = step_ids_from_tokens(torch.tensor([tokens]), config)[0].tolist()
        for indices in references(tokens, steps, pattern):
            own = set(own_tokens(indices, steps, pattern))
            wanted = [int(targets[0, start + i]) if p in own else -100 for p, i in enumerate(indices)]
            ids = torch.tensor([[tokens[i] for i in indices]])
            model(input_ids=ids, targets=torch.tensor([wanted])).loss.sum().backward()
    assert_close(masked, gradients(model))


@pytest.mark.parametrize("attention", TRAINABLE)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_gradients_equal_those_of_the_shortened_chains(family: str, pattern: tuple[int, ...], attention: str) -> None:
    assert_gradients_match(mote(family, attention, question_routing="mean").train(), ROWS, pattern)


def test_full_dropout_trains_each_step_as_its_own_expanded_row() -> None:
    """With step_dropout 1.0 one pass equals the rows (x, x_a), (x, x_g) and (x, A) of the paper's expanded sets."""
    model = mote(question_routing="mean").train()
    question = chain(9, 0, 0, 0)[:-1]
    parts = [chain(0, *sizes, seed=5)[:-1] for sizes in ((6, 0, 0), (0, 4, 0), (0, 0, 7))]
    full = [*question, *(token for part in parts for token in part)]

    def inner_targets(tokens: list[int]) -> Tensor:
        """Every token of a step but its start marker, which follows different tokens in the two layouts."""
        shifted = [*tokens[1:], -100]
        left_out = set(range(len(question) - 1)) | {i for i, t in enumerate(shifted) if t in MARKER_IDS[0::2]}
        return torch.tensor([[-100 if i in left_out else token for i, token in enumerate(shifted)]])

    drop(model, (1, 2))
    model(input_ids=torch.tensor([full]), targets=inner_targets(full)).loss.sum().backward()
    one_pass = gradients(model)
    drop(model, ())
    for part in parts:
        row = question + part
        model(input_ids=torch.tensor([row]), targets=inner_targets(row)).loss.sum().backward()
    assert_close(one_pass, gradients(model))


@torch.no_grad()
@pytest.mark.parametrize("attention", BACKENDS)
def test_no_leak_bit_for_bit(attention: str) -> None:
    model = mote("llama", attention, question_routing="mean").train()
    inputs, offsets = arrange(ROWS[:2], "packed")
    drop(model, (1,))
    before = model(**inputs).logits[0]
    steps = step_ids_from_tokens(inputs["input_ids"], mote_config(), inputs["position_ids"])[0]
    second = offsets[1][1]
    changed = inputs["input_ids"].clone()
    ordinary = changed[0] < VOCABULARY
    dropped = (steps == 1) & (torch.arange(len(steps)) >= second)
    first_document = torch.arange(len(steps)) < second
    for target in (dropped & ordinary, first_document & ordinary):
        other = torch.where(target, (changed[0] + 17) % 90 + 3, changed[0])
        assert not torch.equal(other, changed[0])
        after = model(input_ids=other[None], position_ids=inputs["position_ids"]).logits[0]
        unaffected = (torch.arange(len(steps)) >= second) & ~(steps == 1)
        assert torch.equal(before[unaffected], after[unaffected])
        assert not torch.equal(before[target], after[target])


def test_windows_reach_over_dropped_steps() -> None:
    """A window counts visible tokens: over a dropped step it reaches as far back as in the shortened chain."""
    model = mote("mistral", "sdpa", question_routing="mean").train()
    long_analysis = chain(9, 30, 0, 7)  # far longer than the window of 7
    assert largest_difference(model, [long_analysis], (1,), "right") < 1e-5


@torch.no_grad()
def test_evaluation_drops_nothing() -> None:
    model = mote(question_routing="mean")
    ids = torch.tensor([ROWS[0]])
    plain = model(input_ids=ids).logits
    drop(model, (1, 2))
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert not torch.equal(model.train()(input_ids=ids).logits, plain)


@torch.no_grad()
def test_dropout_is_drawn_per_sample_and_reproducible() -> None:
    model = mote().train()
    tuner = mote_model(model)
    tuner.routing.step_dropout = (0.5, 0.5)
    rows = [chain(8, 3, 3, 4, seed=seed) for seed in range(64)]
    batch = model(input_ids=torch.tensor(rows)).logits
    alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
    assert torch.allclose(batch, alone, atol=1e-4)  # the same steps are dropped, however the rows are batched
    tuner.routing.step = 1
    later = model(input_ids=torch.tensor(rows)).logits
    same = [(a - b).nan_to_num().abs().max() < 1e-4 for a, b in zip(batch, later, strict=True)]
    assert 0 < sum(same) < 64


@pytest.mark.parametrize("name", ["sage", "paged|sdpa", "xformers", "something_new"])
def test_attention_that_would_ignore_the_mask_is_refused(name: str) -> None:
    config = base_model().config
    config._attn_implementation_internal = name
    with pytest.raises(ValueError, match=f"got attn_implementation {name.replace('|', '.')!r}, which would ignore"):
        check_attention(config)


def test_models_that_carry_a_state_are_refused() -> None:
    model = base_model()
    prepare_attention(model)
    model._is_stateful = True
    with pytest.raises(NotImplementedError, match="got LlamaForCausalLM, which carries a state"):
        prepare_attention(model)


def test_an_unknown_implementation_is_refused_in_a_loop_of_ones_own() -> None:
    model = mote("llama").train()
    drop(model, (1,))
    model.get_base_model().config._attn_implementation_internal = "sage"
    with pytest.raises(ValueError, match="'sage', which would ignore the mask"):
        model(input_ids=torch.tensor([ROWS[0]]))


def test_unknown_layer_kinds_are_refused() -> None:
    config = base_model("qwen2").config
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(NotImplementedError, match="'chunked_attention' in qwen2"):
        check_attention(config)


def test_flash_functions_take_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapped flash_attention_2 hands T's kernel call the gathered tensors; a loop stands in for the kernel."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: None, **kwargs: object) -> Tensor:
        assert mask is None
        assert kwargs["is_causal"]
        segments = Segments(None, None, None, kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], 0, 0)
        out = attention.segment_attention(q[0], k[0], v[0], segments, kwargs["softmax_scale"], kwargs["sliding_window"])
        return out[None]

    monkeypatch.setattr(attention, "flash_attention_forward", kernel)
    for name in FLASH[:3]:
        model = mote("llama", question_routing="mean").train()
        model.base_model.model.config._attn_implementation_internal = name  # no flash kernel is installed here
        drop(model, (1,))
        with torch.no_grad():
            flash = model(input_ids=torch.tensor([ROWS[0]])).logits
        dense = mote("llama", question_routing="mean").train()
        drop(dense, (1,))
        assert torch.allclose(flash, dense(input_ids=torch.tensor([ROWS[0]])).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["flash_attention_2", VARLEN])
def test_attention_sinks_reach_the_kernel_or_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def kernel(q: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.update(kwargs)
        return q

    monkeypatch.setattr(attention, "flash_attention_forward", kernel)
    tokens, starts = torch.arange(3), torch.tensor([0, 3], dtype=torch.int32)
    module = base_model("llama").model.layers[0].self_attn
    module.mote_holder = SegmentsHolder()
    module.mote_holder.segments = Segments(tokens, tokens, tokens, starts, starts, 3, 3)
    states, sinks = [torch.randn(1, 2, 3, 8) for _ in range(3)], torch.tensor([1.0, 2.0])
    attend = ALL_ATTENTION_FUNCTIONS[name]
    if name == VARLEN:
        with pytest.raises(NotImplementedError, match=f"{VARLEN}.* attention sinks"):
            attend(module, *states, None, s_aux=sinks)
    else:
        attend(module, *states, None, s_aux=sinks)
        assert torch.equal(seen["s_aux"], sinks)


def test_positions_that_cannot_follow_are_refused() -> None:
    config = BartConfig(vocab_size=96, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=32)
    config.is_decoder, config.is_encoder_decoder = True, False
    with pytest.raises(NotImplementedError, match="BartForCausalLM, which takes no position_ids"):
        prepare_attention(AutoModelForCausalLM.from_config(config))
