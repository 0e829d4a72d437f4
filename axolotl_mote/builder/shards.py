"""A build split over many hosts: each takes its share of the questions, and the shares merge into one build.

A share depends on the ids of the questions alone, not on the order in which shards run or on the other questions.
Every shard screens all questions, keeps a journal of its own, and shares nothing with the others while it runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from axolotl_mote.chain.questions import Question

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Shard:
    """One share.

    Args:
        number: From 1.
        of: How many there are.

    Raises:
        ValueError: If there is no such share.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(f"shard must be I/N with I from 1 to N; got {self.number}/{self.of}. Correct it.")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``I/N``.

        Raises:
            ValueError: If it has another form.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not found:
            raise ValueError(f"shard must be I/N with I from 1 to N; got {text!r}. Write e.g. 2/8.")
        return cls(int(found[1]), int(found[2]))

    def owns(self, question: Question) -> bool:
        """Whether a question belongs to this share."""
        return int(question.id, 16) % self.of == self.number - 1

    def folder(self, output: Path) -> Path:
        """Where its journal and results stand."""
        return output / f"shard-{self.number}-of-{self.of}"


def journals_of_shards(output: Path) -> list[Path]:
    """The journals of all shards below an output folder, in order.

    Raises:
        ValueError: If there are none, if some are missing, or if they are of two different splits.
    """
    found = [re.fullmatch(r"shard-([0-9]+)-of-([0-9]+)", path.parent.name) for path in output.glob(f"*/{JOURNAL}")]
    shards = sorted((int(name[2]), int(name[1])) for name in found if name)
    counts = sorted({of for of, _ in shards})
    if len(counts) != 1:
        got = " and ".join(f"shard-*-of-{of}" for of in counts) or "none"
        raise ValueError(f"output must hold the shards of one split; got {got} at {output}. Run or remove some.")
    wanted = [Shard(number, counts[0]) for number in range(1, counts[0] + 1)]
    present = {number for _, number in shards}
    if missing := [shard.folder(output).name for shard in wanted if shard.number not in present]:
        raise ValueError(f"output must hold all shards; {', '.join(missing)} missing at {output}. Run them first.")
    return [shard.folder(output) / JOURNAL for shard in wanted]
