"""`Question`: a dialogue that ends in a user turn, and where it stands in its source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Messages = list[dict[str, str]]

QUESTION_COLUMNS = ("messages", "prompt", "question", "forbidden_prompt")
"""Columns that can hold a question, the first one present counts; all but the first hold one user turn as text."""


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
