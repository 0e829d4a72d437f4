"""The real SmolLM2 in float32, with random experts: switching is lossless and every chain is valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kit import STEPS, smol_mote, tiny_mote
from transformers import LogitsProcessor, LogitsProcessorList

from axolotl_mote.generation import codec_for, generate_chain

QUESTIONS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": json.loads(line)["prompt"]}]
    for line in (Path(__file__).parents[1] / "data" / "questions_64.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def mote(smollm2_dir):
    return smol_mote(smollm2_dir)


class Script(LogitsProcessor):
    """Makes each row say its own text, whatever the model thinks."""

    def __init__(self, rows: list[list[int]], prompt_length: int) -> None:
        self.rows = torch.tensor(rows)
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        said = self.rows[:, input_ids.shape[1] - self.prompt_length, None]
        return torch.full_like(scores, float("-inf")).scatter(1, said, 0.0)


def test_logits_along_chains_with_cache_equal_one_forward(mote):
    """Four rows, left-padded, that switch steps at different times."""
    model, tokenizer = mote
    codec = codec_for(model, tokenizer)
    words = ["one", "two", "three", "four", "five"] * 3
    prompts, scripts = [], []
    for row in range(4):
        texts = {"analysis": words[: 2 + 3 * row], "guidance": words[row:3], "response": words[: 9 - 2 * row]}
        chain = {name: " ".join(text) or None for name, text in texts.items()}
        question = codec.encode_question(QUESTIONS[row])
        prompts.append(question)
        scripts.append(codec.encode_chain({"messages": QUESTIONS[row]} | chain)["input_ids"][len(question) :])
    switches = [[i for i, token in enumerate(s) if token >= 49152] for s in scripts]
    assert len({tuple(s) for s in switches}) == 4
    length, new = max(map(len, prompts)), max(map(len, scripts))
    pad = tokenizer.pad_token_id
    out = model.generate(
        input_ids=torch.tensor([[pad] * (length - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
        logits_processor=LogitsProcessorList([Script([s + [1] * (new - len(s)) for s in scripts], length)]),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    cached = torch.stack(out.logits, dim=1)
    for row, (prompt, script) in enumerate(zip(prompts, scripts, strict=True)):
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([prompt + script])).logits[0, len(prompt) - 1 : -1]
        finite = torch.isfinite(whole)
        difference = torch.where(finite, cached[row, : len(script)] - whole, 0.0).abs().max().item()
        print(f"row {row}: largest difference {difference:.1e} at a logit scale of {whole[finite].abs().max():.0f}")
        assert difference < 1e-3


def test_greedy_batch_equals_single_rows(mote):
    model, tokenizer = mote
    batch = generate_chain(model, tokenizer, QUESTIONS[:2], max_new_tokens=10, batch_size=2)
    for messages, chain in zip(QUESTIONS[:2], batch, strict=True):
        assert generate_chain(model, tokenizer, messages, max_new_tokens=10).token_ids == chain.token_ids


def test_beam_search_equals_beam_search_without_cache(mote):
    model, tokenizer = mote
    with_cache, without = (
        generate_chain(model, tokenizer, QUESTIONS[0], max_new_tokens=6, num_beams=2, use_cache=cache)
        for cache in (True, False)
    )
    assert with_cache.token_ids == without.token_ids
    assert with_cache.valid


@pytest.mark.parametrize(("steps", "count"), [("adaptive", 32), (list(STEPS), 8)], ids=["adaptive", "full"])
def test_chains_of_real_model(mote, steps, count):
    """The experts are random, so their texts are too; the chains are valid all the same."""
    check_chains(*mote, steps, step_limits=2, count=count)


@pytest.mark.parametrize(
    "steps",
    ["adaptive", ["response"], ["analysis", "response"], ["guidance", "response"], list(STEPS), "verify"],
    ids=str,
)
def test_chains_of_a_tiny_model(steps):
    check_chains(*tiny_mote(), steps, step_limits=8, count=16 if steps == "verify" else 64)


def check_chains(model, tokenizer, steps, step_limits, count) -> None:
    chains = generate_chain(model, tokenizer, QUESTIONS[:count], steps, step_limits=step_limits, batch_size=32)
    assert len(chains) == count
    for chain in chains:
        assert chain.valid
        assert all(0 < count <= step_limits for count in chain.token_counts.values())
        blank = not (chain.response or "").strip()  # a random model may answer with white space alone
        assert chain.finished == ("response" not in chain.truncated and not blank)
        if isinstance(steps, list):
            assert chain.steps == tuple(steps)
