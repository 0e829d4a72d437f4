"""Reasoning that a model without steps writes into its text, in a block such as ``<think>``, before its answer.

Only the beginning of a completion is looked at: what a model says of such marks later on is part of its answer. No
torch, no inspect_ai.
"""

from __future__ import annotations

from typing import NamedTuple

MARKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
}
"""What opens such a block -> what closes it."""


class Thinking(NamedTuple):
    """A completion that begins with reasoning.

    Args:
        reasoning: What is inside the block.
        answer: What follows it; "" if it was not closed.
        mark: What closes the block.
        is_closed: Whether it was closed.
    """

    reasoning: str
    answer: str
    mark: str
    is_closed: bool


def split_thinking(text: str, opened: str | None = None) -> Thinking | None:
    """Reasoning and answer; None if the text does not begin with reasoning.

    Args:
        text: A completion.
        opened: The block that was open before it, if there was one.

    Example:
        >>> split_thinking("<think>A game.</think>Press start.")[:2]
        ('A game.', 'Press start.')
        >>> split_thinking("A game.</think>Press start.", opened="<think>")[:2]
        ('A game.', 'Press start.')
        >>> split_thinking("Write <think>so</think>.")
    """
    text = text.lstrip()
    opening = next((mark for mark in MARKS if text.startswith(mark)), opened)
    if opening not in MARKS:
        return None
    reasoning, closing, answer = text.removeprefix(opening).partition(MARKS[opening])
    return Thinking(reasoning.strip(), answer.lstrip(), MARKS[opening], bool(closing))


def opened_before(text: str, question: str) -> str | None:
    """The block that a completion closes without opening it: a server's template may have opened it.

    Args:
        text: A completion.
        question: What was asked. A mark that is in it tells nothing: the model may repeat it.

    Example:
        >>> opened_before("A game.</think>Press start.", "How?")
        '<think>'
    """
    for opening, closing in MARKS.items():
        before, found, _ = text.partition(closing)
        if found and opening not in before and closing not in question:
            return opening
    return None
