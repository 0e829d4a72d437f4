"""The questions of a build, on disk: memory holds an offset for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from axolotl_mote.chain.questions import Question
from axolotl_mote.files import Closing, RowSpool


class Backlog(Closing):
    """Questions in their order; each is read from disk when it is asked for.

    Args:
        folder: Where the file without a name is that holds them.
    """

    def __init__(self, folder: Path) -> None:
        self._rows = RowSpool(folder)

    def add(self, question: Question) -> None:
        """Append a question."""
        self._rows.append({"messages": question.messages, "row": question.row, "columns": question.columns})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Question:
        return Question(**self._rows[index])

    def __iter__(self) -> Iterator[Question]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Delete the file; safe to call twice."""
        self._rows.close()
