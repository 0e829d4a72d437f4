"""The grammar: whatever the scores, what comes out is a valid chain within its budget."""

from __future__ import annotations

import pytest
import torch
from kit import STEPS, tiny_tokenizer
from transformers import LogitsProcessorList

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.result import Chain
from axolotl_mote.generation.grammar import StepGrammar, make_budget, make_plan

CHECKED = (*STEPS, "check")


class Fixture:
    """A codec and grammars built from it."""

    def __init__(self, steps: tuple[str, ...] = STEPS) -> None:
        self.codec = ChainCodec(tiny_tokenizer(steps), steps)
        self.vocabulary = self.codec.vocabulary
        self.width = len(self.codec.tokenizer)
        self.verdicts = [self.codec.encode_text(verdict) for verdict in ("safe", "unsafe")]

    def grammar(self, steps, total=40, limits=None, check=False, prompt=0, after=0) -> StepGrammar:
        plan = make_plan(steps, self.vocabulary, check)
        checked = plan.last != plan.answer
        budget = make_budget(plan, self.vocabulary, total, limits, 6 if checked else 1, after)
        choices = {plan.last: self.verdicts} if checked else None
        return StepGrammar(self.codec, plan, budget, prompt_length=prompt, after=after, choices=choices)

    def run(self, grammar: StepGrammar, rows: int, seed: int, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """Sample from random scores until the budget is used up."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.zeros(rows, 0, dtype=torch.long) if prompt is None else prompt
        for _ in range(grammar.budget.total):
            scores = grammar(ids, torch.randn(rows, self.width + 3, generator=generator) * 6)
            assert scores.isfinite().any(dim=1).all(), "a row with nothing admissible"
            ids = torch.cat([ids, scores.softmax(-1).multinomial(1, generator=generator)], dim=1)
        return ids

    def parse(self, grammar: StepGrammar, row: list[int]) -> Chain:
        expect_check = grammar.plan.last != grammar.plan.answer
        return self.codec.parse(row, must_close=grammar.must_close, expect_check=expect_check)


@pytest.mark.parametrize("total", [9, 14, 40, 200])
@pytest.mark.parametrize(
    ("steps", "check", "names"),
    [
        ("adaptive", False, STEPS),
        ("adaptive", True, CHECKED),
        (["response"], False, STEPS),
        (["analysis", "response"], False, STEPS),
        (list(STEPS), False, STEPS),
        (["guidance", "response"], True, CHECKED),
    ],
)
def test_random_scores_give_valid_chains(steps, check, names, total):
    kit = Fixture(names)
    if total < 14 and check:
        total = 20
    grammar = kit.grammar(steps, total=total, check=check)
    chosen = set()
    for row in kit.run(grammar, rows=48, seed=total).tolist():
        chain = kit.parse(grammar, row)
        assert chain.valid, row
        assert len(chain.token_ids) <= total
        assert all(count >= 1 for count in chain.token_counts.values())
        if check:
            assert chain.check in ("safe", "unsafe")
        if steps != "adaptive":
            assert chain.steps == tuple(steps) + (("check",) if check else ())
        chosen.add(chain.steps)
        if steps == "adaptive":  # the trainer refuses guidance without analysis
            assert "analysis" in chain.steps or "guidance" not in chain.steps
    if steps == "adaptive" and total >= 40:
        assert len(chosen) >= 3


def test_step_limits_close_a_step_and_say_so():
    kit = Fixture()
    grammar = kit.grammar(list(STEPS), total=100, limits={"analysis": 3, "response": 5})
    for row in kit.run(grammar, rows=32, seed=3).tolist():
        chain = kit.parse(grammar, row)
        assert chain.token_counts["analysis"] <= 3
        assert chain.token_counts["response"] <= 5
        assert ("analysis" in chain.truncated) == (chain.token_counts["analysis"] == 3)
        assert chain.finished == ("response" not in chain.truncated)


def test_budget_keeps_room_for_the_answer():
    kit = Fixture()
    grammar = kit.grammar(list(STEPS), total=64)
    never_end = torch.zeros(1, kit.width)
    never_end[:, list(kit.vocabulary.end_ids)] = -1e4
    ids = torch.zeros(1, 0, dtype=torch.long)
    for _ in range(64):
        ids = torch.cat([ids, grammar(ids, never_end.clone()).argmax(-1, keepdim=True)], dim=1)
    chain = kit.parse(grammar, ids[0].tolist())
    assert chain.valid
    assert not chain.finished
    assert chain.truncated == STEPS
    assert chain.token_counts["response"] >= 16
    assert len(chain.token_ids) == 64


def test_empty_steps_are_not_admitted():
    kit = Fixture()
    grammar = kit.grammar("adaptive")
    opened = torch.tensor([[start] for start in kit.vocabulary.start_ids])
    scores = grammar(opened, torch.zeros(3, kit.width))
    for row, end in enumerate(kit.vocabulary.end_ids):
        assert scores[row, end] == float("-inf")


def test_no_special_token_inside_a_step():
    kit = Fixture()
    grammar = kit.grammar("adaptive")
    ids = torch.tensor([[kit.vocabulary.start_ids[0], 5]])
    scores = grammar(ids, torch.zeros(1, kit.width + 7))
    open_ids = set(scores[0].isfinite().nonzero()[:, 0].tolist())
    assert open_ids == set(range(256)) | {kit.vocabulary.end_ids[0]}


def test_markers_of_the_prompt_are_not_the_chain():
    """A prompt that ends inside a step of an earlier turn does not move the grammar's start."""
    kit = Fixture()
    prompt = torch.tensor([[kit.vocabulary.start_ids[2], 5]])
    scores = kit.grammar("adaptive", prompt=2)(prompt, torch.zeros(1, kit.width))
    assert set(scores[0].isfinite().nonzero()[:, 0].tolist()) == {kit.vocabulary.start_ids[k] for k in (0, 2)}


def test_rows_are_independent_and_reordering_is_harmless():
    """The state is a function of the row alone: any permutation of rows gives the permuted result."""
    kit = Fixture(CHECKED)
    grammar = kit.grammar("adaptive", check=True, total=30)
    ids = kit.run(grammar, rows=16, seed=11)
    order = torch.randperm(16)
    for length in (0, 1, 5, 11, 23, 29):
        scores = torch.randn(16, kit.width)
        assert torch.equal(grammar(ids[order, :length], scores[order]), grammar(ids[:, :length], scores)[order])
        single = torch.cat([grammar(ids[i : i + 1, :length], scores[i : i + 1]) for i in range(16)])
        assert torch.equal(single, grammar(ids[:, :length], scores))


def test_verdict_is_one_of_two_words():
    kit = Fixture(CHECKED)
    grammar = kit.grammar(["response", "check"], total=60)
    verdicts = {kit.parse(grammar, row).check for row in kit.run(grammar, rows=32, seed=5).tolist()}
    assert verdicts == {"safe", "unsafe"}


def test_continuing_after_a_step():
    """With the analysis already in the prompt only the later steps may follow."""
    kit = Fixture()
    prompt = torch.tensor([[7, kit.vocabulary.start_ids[0], 5, kit.vocabulary.end_ids[0]]]).repeat(8, 1)
    grammar = kit.grammar(["analysis", "guidance", "response"], total=30, prompt=4, after=1)
    for row in kit.run(grammar, rows=8, seed=2, prompt=prompt)[:, 4:].tolist():
        assert kit.parse(grammar, row).steps == ("guidance", "response")


def test_other_step_names():
    names = ("plan", "draft", "critique", "final")
    kit = Fixture(names)
    grammar = kit.grammar("adaptive")
    chain = kit.parse(grammar, kit.run(grammar, rows=1, seed=0).tolist()[0])
    assert chain.valid
    assert chain.answer_step == "final"
    assert chain.final == chain.answer
    assert chain.critique == chain.texts.get("critique")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["response", "analysis"], "follow the order"),
        (["analysis", "analysis", "response"], "follow the order"),
        (["analysis"], "hold the answer step"),
        (["thinking", "response"], "must name steps of this adapter"),
        ("fast", "must be 'adaptive'"),
    ],
)
def test_wrong_plans_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        make_plan(steps, Fixture().vocabulary)


def test_check_needs_a_trained_check():
    with pytest.raises(ValueError, match="check must name a trained step"):
        make_plan("adaptive", Fixture().vocabulary, check=True)


@pytest.mark.parametrize(
    ("total", "limits", "message"),
    [(8, None, "at least 9"), (50, 0, "at least 1"), (50, {"reply": 3}, "must name steps of this adapter")],
)
def test_wrong_budgets_are_refused(total, limits, message):
    vocabulary = Fixture().vocabulary
    with pytest.raises(ValueError, match=message):
        make_budget(make_plan(list(STEPS), vocabulary), vocabulary, total, limits)


def test_works_in_a_processor_list():
    kit = Fixture()
    scores = LogitsProcessorList([kit.grammar("adaptive")])(
        torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, kit.width)
    )
    assert scores.isfinite().sum() == 2 * 2
