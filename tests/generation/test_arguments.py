"""What callers of ``generate_chain`` pass: options of ``generate``, judges, and many dialogues at once."""

from __future__ import annotations

import re

import pytest
import torch
from kit import STEPS, tiny_mote
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from axolotl_mote.generation import generate_chain

QUESTIONS = [[{"role": "user", "content": text}] for text in ("How do I kill a Python process?", "hi", "Why?")]


@pytest.fixture(scope="module")
def mote():
    return tiny_mote()


# --- options of generate --------------------------------------------------------------------------------------------


def test_stop_strings_end_the_chain_where_they_stand(mote):
    whole = generate_chain(*mote, QUESTIONS[0], ["response"], max_new_tokens=40)
    stop = re.search(r"(?<=.)[a-z$]{2}", whole.response).group()  # the random model writes half characters too
    stopped = generate_chain(*mote, QUESTIONS[0], ["response"], max_new_tokens=40, stop_strings=stop)
    end = whole.response.index(stop) + len(stop)
    assert stopped.response == whole.response[:end]
    assert stopped.truncated == ("response",)
    assert not stopped.finished
    several = generate_chain(*mote, QUESTIONS, ["response"], max_new_tokens=40, batch_size=3, stop_strings=[stop])
    assert several[0].response == stopped.response


def test_a_generation_config_counts(mote):
    """As if its values were passed one by one; what it leaves open keeps our greedy defaults."""
    config = GenerationConfig(do_sample=True, temperature=3.0, eos_token_id=7, pad_token_id=7)
    sampled = generate_chain(*mote, QUESTIONS[0], max_new_tokens=30, seed=1, generation_config=config)
    same = generate_chain(*mote, QUESTIONS[0], max_new_tokens=30, seed=1, do_sample=True, temperature=3.0)
    greedy = generate_chain(*mote, QUESTIONS[0], max_new_tokens=30)
    assert sampled.token_ids == same.token_ids != greedy.token_ids
    empty = generate_chain(*mote, QUESTIONS[0], max_new_tokens=30, generation_config=GenerationConfig())
    assert empty.token_ids == greedy.token_ids
    named = generate_chain(*mote, QUESTIONS[0], max_new_tokens=30, generation_config=config, do_sample=False)
    assert named.token_ids == greedy.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_config": GenerationConfig(max_new_tokens=9)}, "max_new_tokens must be left .* got 9"),
        ({"generation_config": GenerationConfig(max_length=9)}, "max_length must be left .* got 9"),
        ({"generation_config": GenerationConfig(do_sample=True, num_beams=2)}, "must not be combined with num_beams"),
        ({"generation_config": {"do_sample": True}}, "generation_config must be a GenerationConfig; got dict"),
        ({"min_new_tokens": 9}, "min_new_tokens must be left"),
        ({"attention_mask": 1}, "attention_mask must be left"),
        ({"pad_token_id": 1}, "pad_token_id must be left"),
    ],
)
def test_options_that_would_break_the_chain_are_refused(mote, options, message):
    with pytest.raises(ValueError, match=message):
        generate_chain(*mote, QUESTIONS[0], **options)


class _StopAtOnce(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.ones(len(input_ids), dtype=torch.bool)


def test_verify_does_not_continue_a_chain_that_was_stopped(mote):
    """Its reasoning is incomplete: another attempt would claim steps that stand nowhere in its prompt."""
    calls = []

    def judge(dialogues, answers):
        calls.append(answers)
        return ["unsafe"] * len(answers)

    stop = StoppingCriteriaList([_StopAtOnce()])
    chain = generate_chain(*mote, QUESTIONS[0], "verify", max_new_tokens=60, judge=judge, stopping_criteria=stop)
    assert len(calls) == len(chain.attempts) == 1
    assert chain.truncated == ("response",)
    assert chain.verdict == "unsafe"


# --- judges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "got"),
    [(["safe"], "1 for 3"), (["safe"] * 4, "4 for 3"), ([], "0 for 3"), (None, "None"), ("safe", "'safe'")],
)
def test_a_judge_returns_one_verdict_for_each_answer(mote, verdicts, got):
    with pytest.raises(ValueError, match=f"judge must return one verdict for each answer; got {got}"):
        generate_chain(*mote, QUESTIONS, "verify", max_new_tokens=20, batch_size=3, judge=lambda d, a: verdicts)


def test_a_judge_may_yield_its_verdicts(mote):
    chains = generate_chain(
        *mote, QUESTIONS, "verify", max_new_tokens=20, batch_size=3, judge=lambda d, a: ("safe" for _ in a)
    )
    assert [chain.verdict for chain in chains] == ["safe"] * 3


# --- many dialogues -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["adaptive", "verify"])
def test_dialogues_that_do_not_fit_are_named_before_any_work(mote, monkeypatch, steps):
    model, tokenizer = mote
    long = [{"role": "user", "content": "x" * 5000}]

    def generate(**_):
        raise AssertionError("no batch may run")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(ValueError, match="got 2 faults among 5") as refused:
        generate_chain(model, tokenizer, [QUESTIONS[0], QUESTIONS[1], long, QUESTIONS[2], long], steps, batch_size=1)
    named = [line for line in str(refused.value).splitlines() if "positions" in line]
    assert [line.strip().split(":")[0] for line in named] == ["dialogue 2", "dialogue 4"]
    assert "4096 positions; got 5" in named[0]


def test_faults_of_all_dialogues_are_named(mote):
    bad = [{"role": "user", "content": ""}]
    with pytest.raises(ValueError, match=r"(?s)dialogue 1: .*non-empty.*dialogue 2: .*non-empty"):
        generate_chain(*mote, [QUESTIONS[0], bad, bad])


def test_what_the_template_refuses_is_named(mote, monkeypatch):
    model, tokenizer = mote
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", strict + tokenizer.chat_template)
    system = [{"role": "system", "content": "Be brief."}, *QUESTIONS[0]]
    with pytest.raises(ValueError, match=r"dialogue 1: .*no system turn"):
        generate_chain(model, tokenizer, [QUESTIONS[0], system], list(STEPS))


def test_a_single_dialogue_has_no_number(mote):
    with pytest.raises(ValueError, match=r"^question and max_new_tokens must fit") as refused:
        generate_chain(*mote, [{"role": "user", "content": "x" * 5000}])
    assert "dialogue" not in str(refused.value).split("positions")[0]
