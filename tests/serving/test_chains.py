"""The step grammar of a batch against the one of `generate_chain`, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from kit import tiny_tokenizer

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.generation.grammar import UNLIMITED, StepGrammar, make_budget, make_plan
from axolotl_mote.serving.chains import StepTables, check_request

CODEC = ChainCodec.from_tokenizer(tiny_tokenizer())
WIDTH = 280  # the head is wider than the tokenizer
REQUESTS = [
    ({"steps": "adaptive"}, 24),
    ({"steps": ["response"]}, 9),
    ({"steps": ["analysis", "response"], "step_limit": 3}, None),
    ({"steps": ["analysis", "guidance", "response"]}, 30),
    ({"steps": "adaptive", "step_limit": 2}, 12),
    ({"steps": "adaptive"}, 7),  # no room for every step that may follow
]


def oracle(values, max_tokens):
    plan = make_plan(values["steps"], CODEC.vocabulary)
    total = UNLIMITED if max_tokens is None else max_tokens
    return StepGrammar(
        CODEC, plan, make_budget(plan, CODEC.vocabulary, total, values.get("step_limit")), prompt_length=0
    )


@pytest.mark.parametrize("seed", range(6))
def test_masks_are_those_of_the_grammar_along_random_chains(seed):
    generator = torch.Generator().manual_seed(seed)
    tables = StepTables(CODEC, 8, "cpu")
    slots = torch.randperm(8, generator=generator)[: len(REQUESTS) + 1]
    for slot, (values, max_tokens) in zip(slots.tolist(), REQUESTS, strict=False):
        assert tables.put(slot, values, max_tokens)
    assert not tables.put(int(slots[-1]), None, None)
    grammars = [oracle(*request) for request in REQUESTS]
    rows: list[list[int]] = [[] for _ in slots]
    for turn in range(24):
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max()) + 3
        tokens = torch.full((len(rows), width), CODEC.vocabulary.start_ids[0])  # what lies behind a row is ignored
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row)
        logits = torch.randn(len(rows), WIDTH, generator=generator)
        logits[:, CODEC.vocabulary.marker_ids] += 2 * (turn % 3)
        masked = tables.mask(logits, slots, tokens, lengths)
        assert torch.equal(masked[-1], logits[-1])
        for number, grammar in enumerate(grammars):
            wanted = grammar(torch.tensor([rows[number]], dtype=torch.long), logits[number : number + 1].clone())
            assert torch.equal(masked[number], wanted[0]), (number, rows[number])
            if not rows[number] or rows[number][-1] != CODEC.stop_id:
                rows[number].append(int(masked[number].argmax()))
        rows[-1].append(5)
    assert all(CODEC.parse(row).valid for row, (_, total) in zip(rows, REQUESTS, strict=False) if total)


def test_requests_move_between_slots_and_leave_nothing_behind():
    tables = StepTables(CODEC, 4, "cpu")
    logits, none = torch.zeros(1, WIDTH), torch.zeros(1, 0, dtype=torch.long)
    tables.put(1, {"steps": ["response"]}, 20)
    tables.move(1, 3)
    tables.put(1, None, None)
    assert tables.active == {3}
    zero = torch.zeros(1, dtype=torch.long)
    assert torch.equal(tables.mask(logits, torch.tensor([1]), none, zero), logits)
    allowed = torch.isfinite(tables.mask(logits, torch.tensor([3]), none, zero))[0].nonzero()[:, 0]
    assert allowed.tolist() == [CODEC.vocabulary.start_ids[2]]


@pytest.mark.parametrize(
    ("values", "max_tokens", "message"),
    [
        ({"steps": "verify"}, None, "must hold the answer step|steps must name steps"),
        ({"steps": ["response", "analysis"]}, None, "must follow the order of the adapter"),
        ({"steps": ["analysis"]}, None, "must hold the answer step"),
        ({"steps": ["response", "check"]}, None, "must not hold 'check' at a server"),
        ({"steps": []}, None, "must be 'adaptive' or a list of step names"),
        ({"steps": 3}, None, "must be 'adaptive' or a list of step names"),
        ({"steps": "adaptive", "step_limit": 0}, None, "step_limit must be at least 1"),
        ({"steps": "adaptive", "step_limit": "4"}, None, "step_limit must be a whole number"),
        ({"steps": ["response"]}, 2, "max_tokens must be at least 3"),
    ],
)
def test_wrong_requests_are_refused_before_and_answered_with_nothing_after(values, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        check_request(values, CODEC.vocabulary, max_tokens)
    tables = StepTables(CODEC, 1, "cpu")
    tables.put(0, values, max_tokens)
    zero = torch.zeros(1, dtype=torch.long)
    masked = tables.mask(torch.zeros(1, WIDTH), zero, torch.zeros(1, 0, dtype=torch.long), zero)
    assert torch.isfinite(masked)[0].nonzero()[:, 0].tolist() == [CODEC.stop_id]
