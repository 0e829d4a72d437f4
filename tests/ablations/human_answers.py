"""Write the answers that humans preferred in HH-RLHF as chains of a single step (the paper's Figure 7).

    python tests/ablations/human_answers.py train.jsonl --output outputs/hh-rlhf-chosen

The file holds HH-RLHF's rows: `chosen` is a transcript with turns that begin with "Human:" and "Assistant:". Its last
turn becomes the response, what stands before it the messages. Train with example_configs/ablations/human-answers.yml.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from axolotl_mote.files import json_line, write_atomically

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def chain(transcript: str) -> dict[str, Any] | None:
    """A chain row; None if the transcript is no dialogue of alternating turns that ends with an answer."""
    before, *parts = _TURN.split(transcript)
    turns = [
        {"role": _ROLES[name], "content": text.strip()} for name, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    roles = [turn["role"] for turn in turns]
    alternate = roles == ["user", "assistant"] * (len(roles) // 2) and bool(roles)
    if before.strip() or not alternate or not all(turn["content"] for turn in turns):
        return None
    return {"messages": turns[:-1], "response": turns[-1]["content"]}


def chains(path: Path, column: str = "chosen") -> Iterator[dict[str, Any] | None]:
    """The chain of every row of a .jsonl or .jsonl.gz file.

    Raises:
        ValueError: If a row holds no transcript.
    """
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise ValueError(
                    f"{column} must hold a transcript; got none at {path} row {number}. Use HH-RLHF's files."
                )
            yield chain(row[column])


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transcripts", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder that gets chains.jsonl")
    parser.add_argument("--limit", type=int, help="at most so many chains")
    options = parser.parse_args(argv)
    found = list(chains(options.transcripts))
    kept = [row for row in found if row is not None][: options.limit]
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / "chains.jsonl", b"".join(map(json_line, kept)).decode())
    print(f"{len(kept)} of {len(found)} transcripts -> {options.output / 'chains.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
