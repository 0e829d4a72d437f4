"""Questions: rows of a source to dialogues that end in a user turn; see ``chain.questions`` for the shapes of a row.

Rows that hold no question, repeat another or match an evaluation prompt are dropped with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from axolotl_mote.benchmarks.loading import load_prompts
from axolotl_mote.builder.settings import QuestionSource
from axolotl_mote.builder.texts.similarity import ContaminationFilter, SimilarTexts
from axolotl_mote.builder.texts.sources import read_rows
from axolotl_mote.chain.questions import ROW_COLUMNS, Messages, Question, parse_question_row

_RESERVED = frozenset({"messages", "analysis", "guidance", "response", "check", "verdicts", "reason", "question_id"})


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


def load_questions(
    sources: Iterable[QuestionSource],
    excluded: Iterable[str | QuestionSource] = (),
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
    excluded: Iterable[str | QuestionSource] = (),
    deduplicate: float | None = 0.8,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Question | Dropped]:
    """Read all sources, row by row.

    Two questions are near-duplicates if their last user turns are nearly the same and the turns before are, too; see
    ``SimilarTexts``. What they share otherwise, such as a system turn, does not make them alike.

    Args:
        sources: Where questions come from, in this order.
        excluded: Evaluation prompts; see ``ContaminationFilter``. A name is that of a benchmark: all its prompts that
            ship.
        deduplicate: Similarity from which two texts are nearly the same; None: only identical texts are dropped.
        seed: Seed of ``sample``.
        on_progress: Called with the number of rows read so far, after every 1,000 rows of the sources.

    Yields:
        Each row as a question, or as a dropped row; in the order of the sources.

    Raises:
        ValueError: If a file cannot be read, or no row of a source has a question.
    """
    contamination = ContaminationFilter(deduplicate or 0.8)
    for messages in _excluded_dialogues(excluded, seed):
        contamination.add(messages)
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


def _excluded_dialogues(excluded: Iterable[str | QuestionSource], seed: int) -> Iterator[Messages]:
    for source in excluded:
        if isinstance(source, str):
            yield from (list(prompt.messages) for prompt in load_prompts(source))
        else:
            yield from (question.messages for question in _read_questions(source, seed) if question.messages)


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
            f"{source.label} must hold questions in column {source.column or ' or '.join(ROW_COLUMNS)}; got {count} "
            f"rows, {missing} of them without such a column. Set questions.column."
        )
