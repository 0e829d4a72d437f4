"""Every fault of a chain row by its message."""

from __future__ import annotations

import re
from typing import Any

import pytest
from template_kit import ASK, STEPS, row

from axolotl_mote.chain.rows import ChainDataError, check_row, check_rows

FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("response missing", {"response": None}, "response must be a non-empty string; got None. Write the answer or drop"),
    (
        "response empty",
        {"response": " \n"},
        r"response must be a non-empty string; got ' \n'. Write the answer or drop",
    ),
    ("response no string", {"response": 7}, "response must be a string or null; got int. Quote it or set null."),
    (
        "analysis no string",
        {"analysis": ["a"], "guidance": None},
        "analysis must be a string or null; got list. Quote it or set null.",
    ),
    ("guidance alone", {"analysis": None}, "guidance must follow analysis; got it alone. Write the earlier step"),
    ("guidance alone, blank", {"analysis": " "}, "guidance must follow analysis; got it alone. Write the earlier step"),
    ("messages missing", {"messages": None}, "messages must be a non-empty list of turns; got None. Write [{role"),
    ("messages empty", {"messages": []}, "messages must be a non-empty list of turns; got []. Write [{role, content}"),
    ("messages a string", {"messages": "hi"}, "messages must be a non-empty list of turns; got 'hi'. Write"),
    ("turn a string", {"messages": ["hi", *ASK]}, "messages[0] must be an object with role and content; got str."),
    (
        "role unknown",
        {"messages": [{"role": "human", "content": "hi"}]},
        "messages[0].role must be one of ('system', 'user', 'assistant'); got 'human'. Rename it.",
    ),
    ("role missing", {"messages": [{"content": "hi"}]}, "messages[0].role must be one of"),
    (
        "content empty",
        {"messages": [{"role": "user", "content": ""}]},
        "messages[0].content must be a non-empty string; got ''. Write the text.",
    ),
    (
        "content no string",
        {"messages": [{"role": "user", "content": 3}]},
        "messages[0].content must be a non-empty str",
    ),
    (
        "last turn not the user's",
        {"messages": [*ASK, {"role": "assistant", "content": "ok"}]},
        "messages must end with a user turn; got 'assistant' last. Move the last answer to the step columns.",
    ),
    (
        "ends with system",
        {"messages": [*ASK, {"role": "system", "content": "x"}]},
        "messages must end with a user turn",
    ),
    (
        "check not a verdict",
        {"check": "maybe"},
        "check must be 'safe', 'unsafe' or null; got 'maybe'. Correct or clear",
    ),
]


@pytest.mark.parametrize(("fields", "message"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_fault_of_a_row(fields: dict[str, Any], message: str) -> None:
    steps = [*STEPS, "check"] if "check" in fields else STEPS
    faults = check_row(row(**fields), steps)
    assert len(faults) == 1, faults
    assert faults[0].startswith(message)
    with pytest.raises(
        ChainDataError, match=f"(?s)^mine holds 1 fault; nothing was trained.*row 2: {re.escape(message)}"
    ):
        check_rows([(1, row(id="0")), (2, row(**fields))], steps, "mine")


def test_a_valid_row_has_no_fault() -> None:
    for fields in ({}, {"guidance": None}, {"analysis": None, "guidance": None}, {"check": None}, {"extra": object()}):
        assert check_row(row(**fields), [*STEPS, "check"]) == []


def test_guidance_alone_is_fine_where_the_steps_do_not_require_analysis() -> None:
    assert check_row(row(analysis=None), ["guidance", "response"]) == []


def test_a_long_list_of_faults_is_cut_and_counted() -> None:
    with pytest.raises(ChainDataError, match=r"holds 60 faults(?s:.)*row 25: (?s:.)*and 10 more$"):
        check_rows([(number, {}) for number in range(1, 31)], ["response"], "mine")


def test_an_unpaired_surrogate_is_a_fault() -> None:
    assert check_row(row(response="a\ud800"), STEPS) == [
        "response must be valid Unicode; got an unpaired surrogate at character 1. Correct the text."
    ]
    assert (
        "messages[0].content must be valid Unicode"
        in check_row(row(messages=[{"role": "user", "content": "\udc00"}]), STEPS)[0]
    )
