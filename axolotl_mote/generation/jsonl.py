"""Questions in, answers out, as JSON lines: streamed, resumable after a kill, never a line lost or written twice.

Every output line names the input row and the mode it answers, so that a second run knows what is left. Lines are
appended in one write per batch and synced; a torn last line (the process died while writing) is cut off and its row
done again. Memory does not grow with the files. Nothing here knows about models.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from axolotl_mote.chain import check_messages

ROW, MODE, RUN = "row", "mode", "run"
_QUESTION_FIELDS = ("messages", "prompt", "question", "forbidden_prompt")
_FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Question:
    """One input row: its number in the file, its dialogue, and all its columns."""

    row: int
    messages: list[dict[str, str]]
    columns: dict[str, Any]


def read_questions(path: Path, limit: int | None = None) -> Iterator[Question]:
    """Read dialogues one by one; blank lines are skipped but counted.

    A row holds ``messages``, or a single question as ``prompt``, ``question`` or ``forbidden_prompt``.

    Raises:
        ValueError: At the first row that holds no dialogue.
    """
    with path.open(encoding="utf-8") as file:
        for row, line in enumerate(file):
            if limit is not None and row >= limit:
                return
            if line.strip():
                yield _question(row, line)


def _question(row: int, line: str) -> Question:
    try:
        columns = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"row {row}: not JSON ({error})") from None
    if not isinstance(columns, dict):
        raise ValueError(f"row {row}: not a JSON object")
    for name in _QUESTION_FIELDS:
        value = columns.get(name)
        if name != "messages" and isinstance(value, str):
            value = [{"role": "user", "content": value}]
        elif name != "messages" or value is None:
            continue
        if faults := check_messages(value):
            raise ValueError(f"row {row}: {' '.join(faults)}")
        return Question(row, value, columns)
    raise ValueError(f"row {row}: none of the columns {', '.join(_QUESTION_FIELDS)}")


def check_questions(path: Path, limit: int | None = None) -> Sequence[int]:
    """Read the whole file once before any work is done; returns the digest of each row's dialogue, 0 for blank rows.

    Raises:
        ValueError: Naming up to ten faulty rows at once.
    """
    faults: list[str] = []
    digests = array("Q")
    with path.open(encoding="utf-8") as file:
        for row, line in enumerate(file):
            if (limit is not None and row >= limit) or len(faults) == _FAULTS_SHOWN:
                break
            digests.append(0)
            if not line.strip():
                continue
            try:
                digests[-1] = _digest(_question(row, line).messages)
            except ValueError as error:
                faults.append(str(error))
    if faults:
        raise ValueError(f"{path} must hold one dialogue per line; got " + "; ".join(faults) + ". Correct these rows.")
    if not any(digests):
        raise ValueError(f"{path} must hold at least one question; got none. Add rows.")
    return digests


def _digest(messages: Any) -> int:
    """A number that stands for a dialogue, never 0."""
    text = json.dumps(messages, sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) or 1


@dataclass
class Output:
    """An output file opened for appending, and what it already holds.

    Args:
        path: The file.
        modes: Names of the modes of this run, in order.
        run: Fingerprint of everything that shapes the answers; lines of another run are refused.
        questions: What `check_questions` returned; answers to other questions are refused. Rows beyond it are not
            checked.
        overwrite: Empty the file, once it is locked, instead of continuing it.
    """

    path: Path
    modes: tuple[str, ...]
    run: str
    questions: Sequence[int] = ()
    overwrite: bool = False
    resumed: int = 0
    torn: bool = False
    _done: bytearray = field(default_factory=bytearray, repr=False)
    _file: IO[bytes] | None = field(default=None, repr=False)

    def __enter__(self) -> Output:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ValueError(
                f"output must not be in use; another process writes to {self.path}. Wait for it."
            ) from None
        self._file = file
        try:
            if self.overwrite:
                file.truncate(0)
            self._read_done()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def holds(self, row: int, mode: str) -> bool:
        """Whether the answer to this row in this mode is on disk."""
        place = row * len(self.modes) + self.modes.index(mode)
        return place // 8 < len(self._done) and bool(self._done[place // 8] >> place % 8 & 1)

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write whole lines, in one write, and wait until they are on disk."""
        rows = list(lines)
        file = self._opened()
        file.write(b"".join(_encoded(line) for line in rows))
        file.flush()
        os.fsync(file.fileno())
        for line in rows:
            self._mark(line[ROW], line[MODE])

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            raise ValueError("output must be opened with `with` before it is used.")
        return self._file

    def _mark(self, row: int, mode: str) -> None:
        place = row * len(self.modes) + self.modes.index(mode)
        if place // 8 >= len(self._done):
            self._done.extend(bytes(place // 8 + 1 - len(self._done)))
        self._done[place // 8] |= 1 << place % 8

    def _read_done(self) -> None:
        """Note what is on disk, and cut off a last line without its newline."""
        file = self._opened()
        file.seek(0)
        end = 0
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                self.torn = True
                file.truncate(end)
                break
            end += len(line)
            self._note(number, line)

    def _note(self, number: int, line: bytes) -> None:
        at = f"{self.path} line {number + 1}"
        try:
            entry = json.loads(line)
            row, mode, run = entry[ROW], entry[MODE], entry[RUN]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"output must be a file written by this command; got another line at {at}. Move it."
            ) from None
        if run != self.run:
            raise ValueError(
                f"output must come from the same adapter, steps and limits; {at} has run {run}, this is {self.run}. "
                "Use another file, or --overwrite."
            )
        if not isinstance(row, int) or row < 0 or mode not in self.modes:
            raise ValueError(
                f"output must hold only modes of this run, {', '.join(self.modes)}; got row {row!r} in mode {mode!r} "
                f"at {at}. Name the same modes, use another file, or --overwrite."
            )
        if self.holds(row, mode):
            raise ValueError(f"output must answer each row once per mode; got row {row} {mode} again at {at}. Move it.")
        if row < len(self.questions) and self.questions[row] != _digest(entry.get("messages")):
            raise ValueError(
                f"output must answer the questions of the input; row {row} now holds another one than {at}. "
                "Restore the input, use another file, or --overwrite."
            )
        self._mark(row, mode)
        self.resumed += 1


def _encoded(line: dict[str, Any]) -> bytes:
    """One line as UTF-8; halves of surrogate pairs, which a model can produce and UTF-8 cannot hold, stay escaped."""
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(line) + "\n").encode()


def windows(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Cut a stream into fixed windows, so that a resumed run forms the same batches as an uninterrupted one."""
    window: list[Question] = []
    for question in questions:
        window.append(question)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def output_line(question: Question, mode: str, run: str, chain: dict[str, Any]) -> dict[str, Any]:
    """One output line: where it belongs, the chain, and the input's columns; those of the same name go to ``input``."""
    line: dict[str, Any] = {ROW: question.row, MODE: mode, RUN: run, "messages": question.messages} | chain
    kept = {k: v for k, v in question.columns.items() if k not in line and k != "input"}
    hidden = {k: v for k, v in question.columns.items() if k not in kept and k != "messages"}
    return line | kept | ({"input": hidden} if hidden else {})


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

    def add(self, line: dict[str, Any]) -> None:
        """Count one output line."""
        self.rows += 1
        if line.get("error"):
            self.refused += 1
            return
        self.finished += bool(line["finished"])
        self.spent += line["spent"]
        for name, tokens in line["token_counts"].items():
            self.step_rows[name] = self.step_rows.get(name, 0) + 1
            self.step_tokens[name] = self.step_tokens.get(name, 0) + tokens
        if line.get("check"):
            self.verdicts[line["check"]] = self.verdicts.get(line["check"], 0) + 1

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


def summarize(path: Path) -> dict[str, dict[str, Any]]:
    """Per mode: rows, finished answers, mean tokens; the data behind the length-against-quality curve."""
    modes: dict[str, ModeSummary] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            modes.setdefault(entry[MODE], ModeSummary()).add(entry)
    return {mode: summary.as_dict() for mode, summary in modes.items()}
