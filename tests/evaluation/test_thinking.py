"""Reasoning in the text of a model without steps: what is split off, and what a question cannot cause."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_mote.evaluation.thinking import MARKS, opened_before, split_thinking


@pytest.mark.parametrize(("opening", "closing"), MARKS.items())
def test_a_block_at_the_beginning(opening: str, closing: str) -> None:
    for text in (f"{opening}Hm.{closing}Yes.", f" \n{opening}\n Hm. \n{closing}\n\nYes."):
        assert split_thinking(text) == ("Hm.", "Yes.", closing, True)
    assert split_thinking(f"{opening}Hm. Half of") == ("Hm. Half of", "", closing, False)
    assert split_thinking(f"{opening}\n\n{closing}\n\nYes.") == ("", "Yes.", closing, True)


@pytest.mark.parametrize(
    "text", ["", "Yes.", "Write <think>so</think>.", "<thinker>a</think>", "a</think>b", "> <think>a</think>", "<thi"]
)
def test_what_does_not_begin_with_a_block_is_an_answer(text: str) -> None:
    assert split_thinking(text) is None
    assert split_thinking(text, "<answer>") is None


def test_a_block_that_was_open_before() -> None:
    """The template of some models opens it."""
    assert split_thinking("Hm.</think>Yes.", "<think>") == ("Hm.", "Yes.", "</think>", True)
    assert split_thinking("<think>Hm.</think>Yes.", "<think>") == ("Hm.", "Yes.", "</think>", True)
    assert split_thinking("Hm.", "<think>") == ("Hm.", "", "</think>", False)


def test_what_follows_the_first_end_is_judged() -> None:
    """The last end would hide an answer that ends in one."""
    assert split_thinking("<think>a</think>b</think>c") == ("a", "b</think>c", "</think>", True)
    assert split_thinking("<think>a</thinking></think>c") == ("a</thinking>", "c", "</think>", True)


def test_a_server_that_only_closes_a_block() -> None:
    assert opened_before("Hm.</think>Yes.", "How?") == "<think>"
    assert opened_before("Hm.[/THINK]Yes.", "How?") == "[THINK]"
    assert opened_before("Write <think>so</think>.", "How?") is None
    assert opened_before("Yes.", "How?") is None


@settings(deadline=None)
@given(st.text(), st.text(), st.sampled_from([*MARKS.values()]))
def test_a_question_with_a_mark_splits_no_answer(before: str, after: str, closing: str) -> None:
    """A model may repeat it, and what stands before it would not be judged."""
    assert opened_before(before + closing + after, f"Say {closing} in the middle.") is None


@settings(deadline=None)
@given(st.text(), st.sampled_from([None, *MARKS]))
def test_no_word_is_lost(text: str, opened: str | None) -> None:
    found = split_thinking(text, opened)
    if found is not None:
        whole = f"{found.reasoning}{found.mark if found.is_closed else ''}{found.answer}"
        opening = next(mark for mark, end in MARKS.items() if end == found.mark)
        assert "".join(whole.split()) == "".join(text.lstrip().removeprefix(opening).split())
