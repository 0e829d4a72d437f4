"""The rule that gives a token its step, and reading a chain off its tokens."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import TEMPLATE, tiny_tokenizer

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import chain_form, markers, parse_form
from axolotl_mote.chain.vocabulary import StepVocabulary, advance

VOCABULARY = StepVocabulary(("analysis", "guidance", "response"), (10, 12, 14), (11, 13, 15))
A, END_A, G, END_G, R, END_R = 10, 11, 12, 13, 14, 15


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [
        ([1, A, 2, END_A, 3], [0, 1, 1, 1, 0]),
        ([A, END_A, G, END_G], [1, 1, 2, 2]),
        ([A, 2, R, 3], [1, 1, 3, 3]),  # a start without an end keeps its step until another start
        ([A, 2, 3], [1, 1, 1]),
        ([END_A, 1], [0, 0]),  # an end without a start is question
        ([A, END_R, 1, END_A, 1], [1, 1, 1, 1, 0]),  # another step's end closes nothing
        ([A, A, END_A, END_A], [1, 1, 1, 0]),
        ([], []),
    ],
)
def test_the_rule(tokens: list[int], steps: list[int]) -> None:
    assert VOCABULARY.step_ids(tokens) == steps


@given(st.lists(st.sampled_from([1, 2, A, END_A, G, END_G, R, END_R]), max_size=30))
def test_the_rule_equals_its_definition(tokens: list[int]) -> None:
    """Looked up for each token on its own: the last start at or before it, unless its end stands between the two."""
    for place, step in enumerate(VOCABULARY.step_ids(tokens)):
        starts = [i for i in range(place + 1) if tokens[i] in VOCABULARY.start_ids]
        if not starts:
            assert step == 0
            continue
        opened = VOCABULARY.start_ids.index(tokens[starts[-1]]) + 1
        closed = VOCABULARY.end_ids[opened - 1] in tokens[starts[-1] : place]
        assert step == (0 if closed else opened)


def test_a_document_starts_outside_every_step() -> None:
    assert advance(0, 0) == (0, 0)


def test_marker_ids_come_in_the_order_of_the_markers() -> None:
    assert StepVocabulary.from_marker_ids(VOCABULARY.steps, VOCABULARY.marker_ids) == VOCABULARY
    assert VOCABULARY.marker_ids == [A, END_A, G, END_G, R, END_R]
    kinds = [VOCABULARY.kinds[token] for token in VOCABULARY.marker_ids]
    assert kinds == [1, -1, 2, -2, 3, -3]
    assert len(markers(VOCABULARY.steps)) == 6


def test_names_of_steps() -> None:
    checked = StepVocabulary(("plan", "answer", "check"), (1, 3, 5), (2, 4, 6))
    assert (checked.answer, checked.reasoning, checked.has_check) == ("answer", ("plan",), True)
    assert (VOCABULARY.answer, VOCABULARY.has_check) == ("response", False)
    assert checked.step_id("answer") == 2
    message = "steps must name steps of this adapter, ['plan', 'answer', 'check']; got 'response'"
    with pytest.raises(ValueError, match=re.escape(message)):
        checked.step_id("response")


def test_forms_are_written_one_way_and_read_two_ways() -> None:
    assert chain_form(["analysis", "response"]) == "analysis+response"
    assert parse_form("analysis+response") == parse_form("analysis, response") == ["analysis", "response"]


# --- markers that something else uses -------------------------------------------------------------------------------

ROLES = "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + ROLES
TOOLS = TEMPLATE + "{% if tools %}<|tools|>{{ tools }}<|/tools|>{% endif %}"


@pytest.mark.parametrize(
    ("step", "template", "use"),
    [
        ("im_end", TEMPLATE, "is the tokenizer's eos_token"),
        ("pad", TEMPLATE, "is the tokenizer's pad_token"),
        ("im_start", TEMPLATE, "is in the chat template"),
        ("assistant", ROLES, "is in the chat template"),
        ("system", ROLES, "is in the chat template"),
        ("user", NO_SYSTEM, "is in the chat template"),
        ("tools", TOOLS, "is in the chat template"),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_a_step_named_like_a_token_in_use_is_refused(step: str, template: str, use: str, last: bool) -> None:
    steps = ["plan", step] if last else [step, "response"]
    tokenizer = tiny_tokenizer(steps)
    tokenizer.chat_template = template
    message = f"mote.steps must not name a token that has another use; got {step!r}, but <|{step}|> {use}. Rename"
    with pytest.raises(ValueError, match=re.escape(message)):
        _ = ChainCodec(tokenizer, steps).vocabulary


@pytest.mark.parametrize("step", ["assistant", "im", "end", "reserved_special_token_0"])
def test_words_of_a_template_may_name_steps(step: str) -> None:
    """Where only a part of a token, or plain text, is like the name."""
    tokenizer = tiny_tokenizer([step, "response"])
    assert ChainCodec(tokenizer, [step, "response"]).vocabulary.steps == (step, "response")


def test_the_steps_of_an_exported_model_are_not_the_tokens_of_its_template() -> None:
    """Some templates write tokens of the same form, in pairs, as Phi-4-mini's for tools."""
    tokenizer = tiny_tokenizer(["tools", "plan", "response"])
    tokenizer.chat_template = TOOLS
    assert ChainCodec.from_tokenizer(tokenizer).steps == ("plan", "response")
