"""Files of questions to files of answers, as JSON lines: streamed, resumable after a kill, no row lost or repeated.

Every output row names the input row and the mode that it answers, so a second run knows what is left. Rows are numbered
from 1. A torn last line (the process died while writing) is cut off and its question answered again. Memory does not
grow with the content of the files. No torch, no models.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from axolotl_mote.chain.questions import QUESTION_COLUMNS, Question, question_id
from axolotl_mote.chain.rows import check_messages
from axolotl_mote.files import AppendLog, RowFault, parse_row, raise_faults, read_jsonl

ROW, MODE, RUN = "row", "mode", "run"

FORMAT = 2
"""Part of every run's fingerprint: files whose rows have another meaning are refused. 1 numbered rows from 0."""

_MAX_ROW = 1 << 31  # memory holds a bit for each row up to the last

MAX_DEPTH = 200
"""Brackets within brackets in a question's columns. JSON is read and written by recursion, whose limit depends on how
deep the calls are: what could just be read might not be written after hours of work."""


def read_questions(path: Path, limit: int | None = None) -> Iterator[Question]:
    """Read dialogues one by one; blank lines are skipped but counted.

    A row holds ``messages``, or a single question as text in one of the other ``QUESTION_COLUMNS``.

    Args:
        path: The file.
        limit: Stop after this row.

    Raises:
        ValueError: At the first row that holds no dialogue.
    """
    for number, row in read_jsonl(path):
        if limit is not None and number > limit:
            return
        yield _question(number, row)


def _question(number: int, row: dict[str, Any] | RowFault) -> Question:
    if isinstance(row, RowFault):
        raise ValueError(f"row {number}: {row}")
    if _is_deeper(row, MAX_DEPTH):
        raise ValueError(f"row {number}: columns must be nested at most {MAX_DEPTH} deep; got more. Flatten them.")
    for name in QUESTION_COLUMNS:
        value = row.get(name)
        if name != QUESTION_COLUMNS[0] and isinstance(value, str):
            value = [{"role": "user", "content": value}]
        elif name != QUESTION_COLUMNS[0] or value is None:
            continue
        if faults := check_messages(value):
            raise ValueError(f"row {number}: {' '.join(faults)}")
        return Question(value, number, row)
    raise ValueError(
        f"row {number}: the row must have one of the columns {', '.join(QUESTION_COLUMNS)}; got none. Add the question."
    )


def _is_deeper(row: dict[str, Any], depth: int) -> bool:
    """Whether a value holds lists and objects more than so many levels deep."""
    level: list[Any] = [row]
    while level and depth >= 0:
        children = (child for v in level for child in (v.values() if isinstance(v, dict) else v))
        level = [child for child in children if isinstance(child, (dict, list))]
        depth -= 1
    return bool(level)


def check_questions(path: Path, limit: int | None = None) -> Sequence[int]:
    """Read the whole file once before any work is done.

    Args:
        path: The file.
        limit: Stop after this row.

    Returns:
        A digest of each row's dialogue at the index of its row number; 0 for blank lines and at index 0.

    Raises:
        ValueError: If rows hold no dialogue, naming them all, or if there is no row.
    """
    faults: list[str] = []
    digests = array("Q", [0])
    for number, row in read_jsonl(path):
        if limit is not None and number > limit:
            break
        try:
            digest = _digest(_question(number, row).messages)
        except ValueError as error:
            faults.append(str(error))
            continue
        digests.extend([0] * (number + 1 - len(digests)))
        digests[number] = digest
    raise_faults(faults, f"{path} must hold one dialogue per line; got {{faults}}.")
    if not any(digests):
        raise ValueError(f"{path} must hold at least one question; got none. Add rows.")
    return digests


def _digest(messages: Sequence[Mapping[str, str]]) -> int:
    """The question's id as a number, never 0."""
    return int(question_id(messages), 16) or 1


class AnswerFile:
    """An output file opened for appending, and which answers it already holds.

    Args:
        path: The file; it is locked until ``close``.
        modes: Names of the modes of this run, in order.
        run: Fingerprint of everything that shapes the answers; rows of another run are refused.
        questions: What ``check_questions`` returned; answers to other questions are refused. Rows beyond it are not
            checked.
        overwrite: Empty the file, once it is locked, instead of continuing it.

    Attributes:
        resumed: Number of answers found.

    Raises:
        ValueError: If another process holds the file, or a row of it does not belong to this run.
    """

    def __init__(
        self, path: Path, modes: Sequence[str], run: str, questions: Sequence[int] = (), *, overwrite: bool = False
    ) -> None:
        self.path, self.modes, self.run, self.questions = path, tuple(modes), run, questions
        self.resumed = 0
        self._done = bytearray()  # one bit for each pair of row and mode
        self._log = AppendLog(path, begins=b'{"row": ', clear=overwrite)
        try:
            for number, line in self._log.lines():
                self._resume(f"{path} row {number}", parse_row(line))
            self._log.cut_torn_line()
        except BaseException:
            self._log.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._log.close()

    @property
    def torn(self) -> bool:
        """Whether a torn last line was cut off."""
        return self._log.torn

    def holds(self, row: int, mode: str) -> bool:
        """Whether the answer to this row in this mode is on disk."""
        byte, bit = self._place(row, mode)
        return byte < len(self._done) and bool(self._done[byte] >> bit & 1)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write answer rows, in one write, and wait until they are on disk.

        Raises:
            OSError: If they cannot be written; the file is then as it was.
        """
        written = list(rows)
        try:
            self._log.append(written)
        except OSError as error:
            raise OSError(
                f"output must be writable; got {error.strerror} at {self.path}. Free space and run the same command "
                "again: finished answers are kept."
            ) from error
        for row in written:
            self._mark(row[ROW], row[MODE])

    def _place(self, row: int, mode: str) -> tuple[int, int]:
        """Byte and bit of a pair of row and mode."""
        return divmod(row * len(self.modes) + self.modes.index(mode), 8)

    def _mark(self, row: int, mode: str) -> None:
        byte, bit = self._place(row, mode)
        self._done.extend(bytes(max(0, byte + 1 - len(self._done))))
        self._done[byte] |= 1 << bit

    def _resume(self, where: str, entry: dict[str, Any] | RowFault) -> None:
        """Note an answer that is on disk.

        Raises:
            ValueError: If it is not an answer of this run.
        """
        try:
            fields = {} if isinstance(entry, RowFault) else entry
            row, mode, run, digest = fields[ROW], fields[MODE], fields[RUN], _digest(fields["messages"])
        except (KeyError, TypeError, RecursionError):
            raise ValueError(
                f"output must be a file written by this command; got another row at {where}. Move the file."
            ) from None
        if run != self.run:
            raise ValueError(
                f"output must come from the same adapter, steps, limits and file format; got run {run} at {where}, "
                f"this is {self.run}. Use another file, or --overwrite."
            )
        if type(row) is not int or not 1 <= row <= _MAX_ROW or mode not in self.modes:
            raise ValueError(
                f"output must hold only modes of this run, {', '.join(self.modes)}; got row {row!r} in mode {mode!r} "
                f"at {where}. Name the same modes, use another file, or --overwrite."
            )
        if self.holds(row, mode):
            raise ValueError(
                f"output must answer each row once per mode; got row {row} in mode {mode} again at {where}. "
                "Move the file."
            )
        if row < len(self.questions) and self.questions[row] != digest:
            raise ValueError(
                f"output must answer the questions of the input; got the answer to another question at {where}: row "
                f"{row} of the input has changed. Restore the input, use another file, or --overwrite."
            )
        self._mark(row, mode)
        self.resumed += 1


def windows(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Cut a stream into windows of fixed size, so that a resumed run forms the same batches as an uninterrupted one."""
    window: list[Question] = []
    for question in questions:
        window.append(question)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def answer_row(question: Question, mode: str, run: str, chain: Mapping[str, Any]) -> dict[str, Any]:
    """One output row.

    Args:
        question: The question.
        mode: How it was answered.
        run: Fingerprint of the run.
        chain: The chain as plain data.

    Returns:
        Row, mode, run, messages and the chain, then the input's other columns. Input columns that have one of these
        names are under ``input``.
    """
    row: dict[str, Any] = {ROW: question.row, MODE: mode, RUN: run, "messages": question.messages, **chain}
    kept = {k: v for k, v in question.columns.items() if k not in row and k != "input"}
    renamed = {k: v for k, v in question.columns.items() if k not in kept and k != "messages"}
    return row | kept | ({"input": renamed} if renamed else {})


@dataclass
class ModeSummary:
    """Running totals of one mode."""

    rows: int = 0
    finished: int = 0
    refused: int = 0
    spent: int = 0
    step_rows: dict[str, int] = field(default_factory=dict)
    step_tokens: dict[str, int] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one answer row."""
        self.rows += 1
        if row.get("error"):
            self.refused += 1
            return
        self.finished += bool(row["finished"])
        self.spent += row["spent"]
        for name, tokens in row["token_counts"].items():
            self.step_rows[name] = self.step_rows.get(name, 0) + 1
            self.step_tokens[name] = self.step_tokens.get(name, 0) + tokens
        if row.get("check"):
            self.verdicts[row["check"]] = self.verdicts.get(row["check"], 0) + 1

    def as_dict(self) -> dict[str, Any]:
        """The figures of one mode; tokens are means over all its rows."""
        return {
            "rows": self.rows,
            "finished": self.finished,
            "refused": self.refused,
            "tokens_per_row": round(self.spent / max(1, self.rows), 2),
            "rows_with_step": dict(self.step_rows),
            "step_tokens_per_row": {name: round(n / max(1, self.rows), 2) for name, n in self.step_tokens.items()},
            "verdicts": dict(self.verdicts),
        }


def summarize_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Per mode: rows, finished answers, mean tokens; the data behind the curve of length against quality."""
    modes: dict[str, ModeSummary] = {}
    for _, row in read_jsonl(path):
        if not isinstance(row, RowFault):
            modes.setdefault(row[MODE], ModeSummary()).add(row)
    return {mode: summary.as_dict() for mode, summary in modes.items()}
