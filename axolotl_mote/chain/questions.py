"""`Question`: a dialogue that ends in a user turn, where it stands in its source, and how it is read from a row.

A row can have three shapes: HH-RLHF transcripts (``chosen``), ``messages``, and plain prompts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

from axolotl_mote.chain.quoting import encodable

Messages = list[dict[str, str]]

QUESTION_COLUMNS = ("messages", "prompt", "question", "forbidden_prompt")
"""Columns that can hold a question, the first one present counts; all but the first hold one user turn as text."""

ROW_COLUMNS = (QUESTION_COLUMNS[0], "chosen", *QUESTION_COLUMNS[1:])
"""The same with HH-RLHF's transcripts; the first one that is not empty counts."""

# A run of white space is looked at once, from its start: (?>...) and ++ never go back.
_TURN = re.compile(r"(?:\A|(?<!\s)(?>\s*?\n\n))\s*+(Human|Assistant):")
_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Question:
    """A dialogue that ends in a user turn.

    Args:
        messages: The dialogue.
        row: Number of its row in the source, from 1; 0 if it comes from none.
        columns: Further columns of that row.
    """

    messages: Messages
    row: int = field(default=0, compare=False)
    columns: dict[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits: a hash of the messages."""
        return question_id(self.messages)


def question_id(messages: Sequence[Mapping[str, str]]) -> str:
    """Hash of a dialogue: 16 hexadecimal digits."""
    canonical = json.dumps([[turn["role"], turn["content"]] for turn in messages], ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def parse_transcript(text: str) -> Messages:
    r"""HH-RLHF's ``\n\nHuman: ...\n\nAssistant: ...`` as messages, up to and including the last human turn.

    Consecutive turns of one speaker are joined. A text without such turns is one user turn.
    """
    parts = _TURN.split(text)
    if len(parts) == 1:
        return [{"role": "user", "content": text.strip()}]
    turns = [
        {"role": _ROLES[who.lower()], "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return _up_to_last_user(_join_neighbors(turns))


def parse_question_row(row: dict[str, Any], column: str | None) -> tuple[Messages, str]:
    """The dialogue in a row, as valid UTF-8, and the column it came from.

    Raises:
        KeyError: If the row has none of the columns.
        ValueError: If the column holds no dialogue with a user turn.
    """
    name = column or next((c for c in ROW_COLUMNS if row.get(c)), None)
    if name is None or row.get(name) is None:
        raise KeyError(column or ", ".join(ROW_COLUMNS))
    value = row[name]
    if isinstance(value, str):
        messages = parse_transcript(value) if name == "chosen" or value.startswith("\n\nHuman:") else [_user(value)]
    else:
        messages = _up_to_last_user(_join_neighbors([_turn(turn) for turn in value]))
    if not messages or not all(turn["content"] for turn in messages):
        raise ValueError("empty turn" if messages else "no user turn")
    return [{**turn, "content": encodable(turn["content"])} for turn in messages], name


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text.strip()}


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    """One turn of ``messages``; ShareGPT's ``from`` and ``value`` are read too."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(f"turn with role {role!r}")
    return {"role": _ROLES[role], "content": content.strip()}


def _join_neighbors(turns: Messages) -> Messages:
    return [
        {"role": role, "content": "\n\n".join(turn["content"] for turn in same if turn["content"])}
        for role, same in groupby(turns, key=itemgetter("role"))
    ]


def _up_to_last_user(turns: Messages) -> Messages:
    last = max((number for number, turn in enumerate(turns, start=1) if turn["role"] == "user"), default=0)
    return turns[:last]
