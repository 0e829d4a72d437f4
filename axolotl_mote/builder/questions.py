"""Questions from files and data sets: dialogues that end in a user turn, each with an id that depends on its text.

It reads JSONL, JSON, CSV, Parquet and Hugging Face data sets in three shapes: HH-RLHF transcripts (``chosen``),
``messages`` and plain prompts. Rows that cannot be a question, repeat another or hold an evaluation prompt are dropped
with a reason. It knows nothing about models.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from typing import Any

from axolotl_mote.builder.calls import Messages
from axolotl_mote.builder.hygiene import ContainedTexts, SimilarTexts, encodable
from axolotl_mote.builder.settings import QuestionSource

COLUMNS = ("messages", "chosen", "prompt", "question", "forbidden_prompt")
_RESERVED = frozenset({"messages", "analysis", "guidance", "response", "check", "verdicts", "reason", "question_id"})
_TURN = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):[ \t]*")
_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Question:
    """A dialogue that ends in a user turn.

    Attributes:
        id: 16 hexadecimal digits, a hash of the messages.
        messages: The dialogue.
        columns: Further columns of the source row, kept in the chain row.
    """

    id: str
    messages: Messages
    columns: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Dropped:
    """A row that was not used: where it stood, why, and what it held."""

    source: str
    row: int
    reason: str
    messages: Messages
    columns: dict[str, Any] = field(default_factory=dict)


def question_id(messages: Messages) -> str:
    """Hash of a dialogue: 16 hexadecimal digits."""
    canonical = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def parse_transcript(text: str) -> Messages:
    r"""HH-RLHF's ``\n\nHuman: ...\n\nAssistant: ...`` as messages, up to and including the last human turn.

    Neighbouring turns of one speaker are joined. A text without such turns is one user turn.
    """
    parts = _TURN.split(text)
    if len(parts) == 1:
        return [{"role": "user", "content": text.strip()}]
    turns = [
        {"role": _ROLES[who.lower()], "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return _up_to_last_user(_join_neighbours(turns))


def parse_row(row: dict[str, Any], column: str | None) -> tuple[Messages, str]:
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
        messages = _up_to_last_user(_join_neighbours([_turn(turn) for turn in value]))
    if not messages or not all(turn["content"] for turn in messages):
        raise ValueError("empty turn" if messages else "no user turn")
    return [{**turn, "content": encodable(turn["content"])} for turn in messages], name


def load_questions(
    sources: Iterable[QuestionSource],
    excluded: Iterable[QuestionSource] = (),
    deduplicate: float | None = 0.8,
    seed: int = 0,
) -> tuple[list[Question], list[Dropped]]:
    """Read all sources.

    Args:
        sources: Where questions come from, in this order.
        excluded: Evaluation prompts; see ``Exam``.
        deduplicate: Similarity from which two texts are nearly the same; None: only identical ones.
        seed: Of sources with ``sample``.

    Returns:
        The questions in the order of the sources, and the rows dropped. Reasons: unusable_question,
        duplicate_question, near_duplicate_question, excluded.

    Raises:
        ValueError: If a file cannot be read, or no row of a source has a question.
    """
    exam = Exam(deduplicate or 0.8)
    for source in excluded:
        for _, messages, _ in _dialogues(source, seed):
            if messages:
                exam.add(messages)
    questions: list[Question] = []
    dropped: list[Dropped] = []
    seen_ids: set[str] = set()
    seen = SimilarTexts(deduplicate)
    for source in sources:
        for row, messages, columns in _dialogues(source, seed):
            name = question_id(messages)
            text = "\n".join(turn["content"] for turn in messages)
            reason = None
            if not messages:
                reason = "unusable_question"
            elif name in seen_ids:
                reason = "duplicate_question"
            elif exam.holds(messages):
                reason = "excluded"
            elif deduplicate is not None and seen.find(text):
                reason = "near_duplicate_question"
            if reason:
                dropped.append(Dropped(source.label, row, reason, messages, columns))
                continue
            seen_ids.add(name)
            seen.add(name, text)
            questions.append(Question(name, messages, columns))
    return questions, dropped


class Exam:
    """The contamination guard: evaluation prompts that no question may be or hold.

    A question is one of them if all its user turns together are, or nearly, or one of its turns of three or more words
    is ("Yes." may well stand in both). It holds one if the prompt, of three or more words, stands in its user turns
    word for word.

    Args:
        threshold: Jaccard similarity of what is nearly the same.
    """

    def __init__(self, threshold: float) -> None:
        self._similar, self._contained, self._count = SimilarTexts(threshold), ContainedTexts(), 0

    def add(self, messages: Messages) -> None:
        """Remember an evaluation prompt."""
        self._count += 1
        self._similar.add(str(self._count), _user_text(messages))
        self._contained.add(_user_text(messages))

    def holds(self, messages: Messages) -> bool:
        """True if a question must not be trained on."""
        if not self._count:
            return False
        turns = [turn["content"] for turn in messages if turn["role"] == "user" and len(turn["content"].split()) >= 3]
        whole = _user_text(messages)
        return self._contained.inside(whole) or any(map(self._similar.find, [whole, *turns]))


def read_rows(source: QuestionSource, seed: int = 0) -> Iterable[tuple[int, dict[str, Any]]]:
    """The rows of a source with their numbers from 1.

    Raises:
        ValueError: If the file is missing or a line is no JSON object; all such lines at once.
    """
    path = Path(source.path)
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind in _READERS:
        if not path.is_file():
            raise ValueError(f"questions.path must be an existing file; got {path}. Correct the path.")
        rows = _READERS[kind](path)
    else:
        rows = _read_dataset(source)
    numbered = enumerate(islice(rows, source.limit), start=1)
    if source.sample is None:
        return numbered
    draw = random.Random(seed)  # each row gets its own number, whatever the size of the sample
    return sorted(nsmallest(source.sample, numbered, key=lambda _: draw.random()), key=lambda row: row[0])


def _dialogues(source: QuestionSource, seed: int) -> Iterator[tuple[int, Messages, dict[str, Any]]]:
    """Row number from 1, dialogue (empty if unusable) and further columns of each row."""
    missing = usable = count = 0
    for number, row in read_rows(source, seed):
        count += 1
        try:
            messages, column = parse_row(row, source.column)
            usable += 1
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            missing += isinstance(error, KeyError)
            messages, column = [], source.column or ""
        drop = _RESERVED | {column} | ({"chosen", "rejected"} if column == "chosen" else set())
        yield number, messages, {key: value for key, value in row.items() if key not in drop}
    if not usable:
        raise ValueError(
            f"{source.label} must hold questions in column {source.column or ' or '.join(COLUMNS)}; got {count} rows, "
            f"{missing} of them without such a column. Set questions.column."
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of bytes, unpacked if it ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} must be a whole gzip file; got: {error}. Fetch it again.") from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    faults = []
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                faults.append(f"  line {number}: {error}")
                continue
            if isinstance(row, dict):
                yield row
            else:
                faults.append(f"  line {number}: {type(row).__name__} instead of an object")
    if faults:
        shown = "\n".join(faults[:20]) + (f"\n  and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise ValueError(f"{path} must hold one JSON object a line; got {len(faults)} others:\n{shown}\nCorrect them.")


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    with _opened(path) as file:
        content = file.read()
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise ValueError(
            f"{path} must hold a JSON list of objects; got: {error}. Use .jsonl for one a line."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a JSON list of objects; got something else. Use .jsonl for one a line.")
    yield from rows


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _read_dataset(source: QuestionSource) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    where = {"data_dir": source.data_dir, "split": source.split, "revision": source.revision}
    for row in load_dataset(source.path, source.name, **where):
        yield dict(row)


def _user_text(messages: Messages) -> str:
    return "\n".join(turn["content"] for turn in messages if turn["role"] == "user")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text.strip()}


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    """One turn of ``messages``; also reads ShareGPT's ``from`` and ``value``."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(f"turn with role {role!r}")
    return {"role": _ROLES[role], "content": content.strip()}


def _join_neighbours(turns: Messages) -> Messages:
    joined: Messages = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            joined[-1] = {"role": turn["role"], "content": f"{joined[-1]['content']}\n\n{turn['content']}".strip()}
        else:
            joined.append(turn)
    return joined


def _up_to_last_user(turns: Messages) -> Messages:
    while turns and turns[-1]["role"] != "user":
        turns = turns[:-1]
    return turns
