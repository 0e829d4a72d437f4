"""Questions: rows of a source to dialogues that end in a user turn.

A row can have three shapes: HH-RLHF transcripts (``chosen``), ``messages``, and plain prompts. Rows that hold no
question, repeat another or match an evaluation prompt are dropped with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from axolotl_mote.builder.settings import QuestionSource
from axolotl_mote.builder.texts.similarity import ContaminationFilter, SimilarTexts
from axolotl_mote.builder.texts.sources import read_rows
from axolotl_mote.chain.questions import QUESTION_COLUMNS, Messages, Question
from axolotl_mote.chain.quoting import encodable

COLUMNS = (QUESTION_COLUMNS[0], "chosen", *QUESTION_COLUMNS[1:])
"""Columns that can hold a question; the first one present counts."""

_RESERVED = frozenset({"messages", "analysis", "guidance", "response", "check", "verdicts", "reason", "question_id"})
# A run of white space is looked at once, from its start: (?>...) and ++ never go back.
_TURN = re.compile(r"(?:\A|(?<!\s)(?>\s*?\n\n))\s*+(Human|Assistant):")
_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Dropped:
    """A row that is not used.

    Args:
        question: What the row held; without messages if it held no question.
        source: Name of its source.
        reason: unusable_question, duplicate_question, near_duplicate_question or excluded.
    """

    question: Question
    source: str
    reason: str


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
    name = column or next((c for c in COLUMNS if row.get(c)), None)
    if name is None or row.get(name) is None:
        raise KeyError(column or ", ".join(COLUMNS))
    value = row[name]
    if isinstance(value, str):
        messages = parse_transcript(value) if name == "chosen" or value.startswith("\n\nHuman:") else [_user(value)]
    else:
        messages = _up_to_last_user(_join_neighbors([_turn(turn) for turn in value]))
    if not messages or not all(turn["content"] for turn in messages):
        raise ValueError("empty turn" if messages else "no user turn")
    return [{**turn, "content": encodable(turn["content"])} for turn in messages], name


def load_questions(
    sources: Iterable[QuestionSource],
    excluded: Iterable[QuestionSource] = (),
    deduplicate: float | None = 0.8,
    seed: int = 0,
) -> tuple[list[Question], list[Dropped]]:
    """The questions and the dropped rows of all sources, as lists; see ``screen_questions``."""
    questions: list[Question] = []
    dropped: list[Dropped] = []
    for row in screen_questions(sources, excluded, deduplicate, seed):
        if isinstance(row, Question):
            questions.append(row)
        else:
            dropped.append(row)
    return questions, dropped


def screen_questions(
    sources: Iterable[QuestionSource],
    excluded: Iterable[QuestionSource] = (),
    deduplicate: float | None = 0.8,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Question | Dropped]:
    """Read all sources, row by row.

    Two questions are near-duplicates if their last user turns are nearly the same and the turns before are, too; see
    ``SimilarTexts``. What they share otherwise, such as a system turn, does not make them alike.

    Args:
        sources: Where questions come from, in this order.
        excluded: Evaluation prompts; see ``ContaminationFilter``.
        deduplicate: Similarity from which two texts are nearly the same; None: only identical texts are dropped.
        seed: Seed of ``sample``.
        on_progress: Called with the number of rows read so far, after every 1,000 rows of the sources.

    Yields:
        Each row as a question, or as a dropped row; in the order of the sources.

    Raises:
        ValueError: If a file cannot be read, or no row of a source has a question.
    """
    contamination = ContaminationFilter(deduplicate or 0.8)
    for source in excluded:
        for question in _read_questions(source, seed):
            if question.messages:
                contamination.add(question.messages)
    seen_ids: set[str] = set()
    seen = SimilarTexts(deduplicate)
    count = 0
    for source in sources:
        for question in _read_questions(source, seed):
            count += 1
            if count % 1000 == 0:
                on_progress(count)
            *before, last = [turn["content"] for turn in question.messages] or [""]
            turns_before = "\n".join(before)
            reason = None
            if not question.messages:
                reason = "unusable_question"
            elif question.id in seen_ids:
                reason = "duplicate_question"
            elif contamination.matches(question.messages):
                reason = "excluded"
            elif deduplicate is not None and seen.find(last, turns_before):
                reason = "near_duplicate_question"
            if reason:
                yield Dropped(question, source.label, reason)
                continue
            seen_ids.add(question.id)
            seen.add(question.id, last, turns_before)
            yield question


def _read_questions(source: QuestionSource, seed: int) -> Iterator[Question]:
    """The question in each row; without messages where the row holds none."""
    missing = usable = count = 0
    for number, row in read_rows(source, seed):
        count += 1
        try:
            messages, column = parse_question_row(row, source.column)
            usable += 1
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            missing += isinstance(error, KeyError)
            messages, column = [], source.column or ""
        drop = _RESERVED | {column} | ({"chosen", "rejected"} if column == "chosen" else set())
        yield Question(messages, number, {key: value for key, value in row.items() if key not in drop})
    if not usable:
        raise ValueError(
            f"{source.label} must hold questions in column {source.column or ' or '.join(COLUMNS)}; got {count} rows, "
            f"{missing} of them without such a column. Set questions.column."
        )


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
