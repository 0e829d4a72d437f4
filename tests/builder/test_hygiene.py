"""Generated text: what is cleaned off, and what makes it unusable."""

from __future__ import annotations

import pytest

from axolotl_mote.builder.settings import Hygiene
from axolotl_mote.builder.texts.hygiene import clean, defect
from axolotl_mote.chain.steps import DEFAULT_STEPS, markers


@pytest.mark.parametrize(
    "token", [*markers([*DEFAULT_STEPS, "check"]), "<|im_end|>", "<｜User｜>", "</s>", "[INST]", "<end_of_turn>"]
)
def test_control_tokens_are_removed_at_the_ends_and_broken_up_inside(token: str) -> None:
    text, broken = clean(f" {token}\nfirst {token} second {token}{token}\n")
    assert broken == 1
    assert token not in text
    assert text.startswith("first ")
    assert text.endswith(" second")


def test_ordinary_text_stays_as_it_is() -> None:
    text = "if a < b: print([1, 2]) | x <b>bold</b> <stdio.h> a|b"
    assert clean(text) == (text, 0)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>VERDICT: SAFE\n</think>\n\nHello there.", "Hello there."),
        ("Okay, the user asks...\n</think>\n\nCall a locksmith.", "Call a locksmith."),
        ("<think>\nHm.\n</think>\n<think>\nAgain.\n</think>\nYes.", "Yes."),
        ("<think>\nIt never ends", ""),
        ("Write <think> to begin.", "Write <think> to begin."),
    ],
)
def test_reasoning_before_the_text_is_cut_off(text: str, left: str) -> None:
    assert clean(text) == (left, 0)


def test_halves_of_characters_become_question_marks() -> None:
    assert clean("A \ud83d half, a whole \U0001f600.") == ("A ? half, a whole \U0001f600.", 0)


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("", "stop", "empty"),
        (" \n ...", "stop", "empty"),
        ("A fine answer that goes on and", "length", "truncated"),
        ("a line\nother words\na line\nmore words\na line\n", "stop", "repeated"),
        ("I will say it again and again. " * 12, "stop", "repeated"),
        ("I'm sorry, but I can't assist with that.", "stop", "refusal"),
        ("I’m sorry, I cannot help with that request.", "stop", "refusal"),
        ("As an AI language model, I cannot do this.", "stop", "refusal"),
        ("", "filtered", "filtered"),
        ("too long", "refused", "refused_by_server"),
        ("Sorry to hear that. Rest, drink water, and call a doctor if it lasts.", "stop", None),
        ("- bread\n- milk\n- bread\n- eggs", "stop", None),
    ],
)
def test_defects(text: str, finish: str, reason: str | None) -> None:
    assert defect(clean(text)[0], finish, Hygiene()) == reason


def test_a_long_answer_that_opens_with_a_refusal_is_kept() -> None:
    text = "I'm sorry, but I can't help with that. " + " ".join(
        f"Instead, idea number {i} may help." for i in range(10)
    )
    assert defect(text, "stop", Hygiene()) is None


def test_own_refusal_patterns() -> None:
    assert defect("Nope, not today.", "stop", Hygiene(refusal_patterns=["nope"])) == "refusal"
