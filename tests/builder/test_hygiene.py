"""Generated text: what is cleaned off, and what makes it unusable; no foreign text takes more than linear time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from axolotl_mote.builder.settings import Hygiene, Stage
from axolotl_mote.builder.texts.hygiene import clean, defect
from axolotl_mote.builder.texts.prompts import Prompts
from axolotl_mote.builder.texts.similarity import normalize
from axolotl_mote.builder.texts.verdict import parse_verdict
from axolotl_mote.chain.questions import parse_transcript
from axolotl_mote.chain.quoting import quote
from axolotl_mote.chain.rows import check_row
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


PROMPTS = Prompts({"response": Stage()})
READERS: dict[str, Callable[[str], object]] = {
    "clean": lambda text: clean(text, ["%%me%%", "  "]),
    "defect": lambda text: defect(text, "stop", Hygiene()),
    "verdict": lambda text: parse_verdict(text, "guard"),  # whose lines are read as "verdict" reads them, and more
    "transcript": parse_transcript,
    "normalize": normalize,
    "leaks": PROMPTS.leaks,
    "quote": quote,
    "row": lambda text: check_row({"messages": [{"role": "user", "content": text}], "response": text}, ["response"]),
}
CHARACTERS = [
    *"\n\r\t |[]<>*_#~a7\"'`-.:%\x00",
    *("\r\n", "\u2028", "\u3000", "—", "’", "漢", "｜", "\u0301\u0316", "\u200b", "\ufb03"),
]
# What a pattern begins with, again and again, without what it ends with.
BEGINNINGS = [
    *("<|", "<|a", "|>", "[|", "[|ab", "]~", "]<]a ", "<s>", "<s>\n", "[INST", "<<SYS", "<seed:", "<start_of_", "< <"),
    *(
        "<think>",
        "</think>",
        "</think> ",
        "[THINK]",
        "\n<think",
        "\n\n",
        "\n\nH",
        "\n\nHuman:",
        "\n\nHuman: a",
        "Human: ",
    ),
    *(
        "verdict: ",
        "verdict:\n",
        "verdict" + " " * 99,
        "s ",
        "s a f ",
        "safe ",
        "S1, ",
        "S1,S2\n",
        "**",
        "i can't ",
        "'",
    ),
    *(
        "i'm sorry, but as an a ",
        "as an ai ",
        "a b c d ",
        "\n\n\t ",
        "a" + "\n" * 999,
        "a" + " " * 999,
        " \n" * 999 + ".",
    ),
]


@pytest.mark.parametrize("reader", READERS)
def test_foreign_text_takes_linear_time(reader: str) -> None:
    """A quadratic pattern takes seconds for 10,000 characters, and hours for a million."""
    for units, most in ((CHARACTERS, 1_000_000), (BEGINNINGS, 50_000)):
        for unit in units:
            for size, before, after in ((10_000, "", ""), (10_000, "a", "b"), (most, "a", "b")):
                text = before + unit * (size // len(unit)) + after
                assert seconds(READERS[reader], text) < 40e-6 * size, f"{before!r} + {unit!r} * {size} + {after!r}"


def seconds(read: Callable[[str], object], text: str) -> float:
    started = time.process_time()
    read(text)
    return time.process_time() - started
