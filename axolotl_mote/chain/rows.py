"""Checks of chain rows: every fault of a data set at once, each with its row, field and remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from axolotl_mote.chain.codec import ROLES
from axolotl_mote.chain.steps import CHECK, answer_step, reasoning_steps
from axolotl_mote.files import RowFault, raise_faults


class ChainDataError(ValueError):
    """Rows of a chain data set that cannot be trained on; the message lists them with row, field and remedy."""


def check_row(row: Any, steps: Sequence[str]) -> list[str]:
    """Faults of one row as "field must ...; got ... . Remedy." strings; an empty list means it can be trained on."""
    if not isinstance(row, Mapping):
        return [f"the row must be an object; got {type(row).__name__}. Write one JSON object per line."]
    faults = check_messages(row.get("messages"))
    answer = answer_step(steps)
    for step in steps:
        text = row.get(step)
        if text is not None and not isinstance(text, str):
            faults.append(f"{step} must be a string or null; got {type(text).__name__}. Quote it or set null.")
        elif step == CHECK and text not in (None, "safe", "unsafe"):
            faults.append(f"check must be 'safe', 'unsafe' or null; got {text!r}. Correct or clear it.")
        elif fault := _unicode_fault(text):
            faults.append(f"{step} {fault}")
        elif step == answer and not (text or "").strip():
            faults.append(f"{answer} must be a non-empty string; got {text!r}. Write the answer or drop the row.")
    for earlier, later in pairwise(reasoning_steps(steps)):
        if _is_present(row, later) and not _is_present(row, earlier):
            faults.append(
                f"{later} must follow {earlier}; got it alone. Write the earlier step, clear the later one, or leave "
                f"{earlier} out of mote.steps."
            )
    return faults


def _is_present(row: Mapping[str, Any], step: str) -> bool:
    text = row.get(step)
    return isinstance(text, str) and bool(text.strip())


def _unicode_fault(text: Any) -> str | None:
    """JSON can spell halves of characters that no tokenizer and no table can hold."""
    half = re.search("[\ud800-\udfff]", text) if isinstance(text, str) else None
    if half is None:
        return None
    return f"must be valid Unicode; got an unpaired surrogate at character {half.start()}. Correct the text."


def check_messages(messages: Any) -> list[str]:
    """Faults of a dialogue that ends with a question, as "field must ...; got ... . Remedy." strings."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return [f"messages must be a non-empty list of turns; got {messages!r}. Write [{{role, content}}, ...]."]
    faults = []
    for number, turn in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(turn, Mapping):
            faults.append(f"{where} must be an object with role and content; got {type(turn).__name__}. Correct it.")
            continue
        if turn.get("role") not in ROLES:
            faults.append(f"{where}.role must be one of {ROLES}; got {turn.get('role')!r}. Rename it.")
        if not isinstance(turn.get("content"), str) or not turn["content"].strip():
            faults.append(f"{where}.content must be a non-empty string; got {turn.get('content')!r}. Write the text.")
        elif fault := _unicode_fault(turn["content"]):
            faults.append(f"{where}.content {fault}")
    last = messages[-1]
    if isinstance(last, Mapping) and last.get("role") in ("system", "assistant"):
        faults.append(
            f"messages must end with a user turn; got {last['role']!r} last. Move the last answer to the step columns."
        )
    return faults


class SeenIds:
    """Which ids of a data set have been seen, and in which row."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}

    def add(self, number: int, row_id: Any) -> list[str]:
        """Faults of a row's id, as those of ``check_row``: none, or that an earlier row has it; None is no id."""
        if row_id is None or (first := self._first.setdefault(str(row_id), number)) == number:
            return []
        return [f"id must be unique; got {row_id!r} again, first at row {first}. Drop one."]


def check_rows(rows: Iterable[tuple[int, Any]], steps: Sequence[str], where: str) -> None:
    """Check all rows and report every fault at once.

    Args:
        rows: Pairs of row number (from 1) and row, or why its line cannot be read.
        steps: The steps to train.
        where: The data set's name, for the message.

    Raises:
        ChainDataError: If any row has a fault; the message names row, field and remedy.
    """
    faults: list[str] = []
    ids = SeenIds()
    for number, row in rows:
        if isinstance(row, RowFault):
            found = [str(row)]
        else:
            found = check_row(row, steps) + ids.add(number, row.get("id") if isinstance(row, Mapping) else None)
        faults += [f"row {number}: {fault}" for fault in found]
    raise_row_faults(faults, where)


def raise_row_faults(faults: Sequence[str], where: str) -> None:
    """Raise a ``ChainDataError`` with all faults of a data set, each as "row 3: ...", if there are any."""
    raise_faults(faults, f"{where} holds {{faults}}; nothing was trained.", ChainDataError)
