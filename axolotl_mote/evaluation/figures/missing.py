"""What is missing from an evaluation, in words: answers, scores, and scores that must not be averaged.

It reads the manifest and the rows alone, so a report that is written again says the same as the run did.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from axolotl_mote.evaluation.figures.cells import variant_name
from axolotl_mote.evaluation.figures.measures import Row
from axolotl_mote.evaluation.settings import identity_hash

_Judge = tuple[str | None, ...]
"""What tells judges apart: grader, name, its prompt."""


def missing_of(cell: Mapping[str, Any], rows: Sequence[Row], grader: dict[str, Any] | None) -> list[str]:
    """What a cell lacks.

    Args:
        cell: Of the manifest: system, steps, task, planned; where known ``fault``, why answers are missing, and
            ``damaged``, logs that cannot be read.
        rows: Its rows.
        grader: Identity of the evaluation's grader; None if there is none.
    """
    total, answered = sum(cell["planned"].values()), sum(row["error"] is None for row in rows)
    errors = len(rows) - answered
    found = []
    if answered != total:
        why = cell.get("fault") or (f"{errors} failed" if errors else "")
        found.append(f"{total - answered} of {total} answers are missing{why and ': '}{why}")
    failed = sum(any(score["status"] == "failed" for score in row["scores"].values()) for row in rows)
    if failed and grader:
        found.append(f"the judge failed on {failed} of {answered} answers")
    found += _judge_faults(rows, identity_hash(grader) if grader else None)
    found += [f"{log} cannot be read; it was left out" for log in cell.get("damaged") or ()]
    name = f"{variant_name((cell['system'], cell['steps']))}, {cell['task']}"
    return [f"{name}: {fault}" for fault in found]


def _judge_faults(rows: Iterable[Row], present: str | None) -> list[str]:
    """Scores that must not be averaged, or are not by the grader of the evaluation file."""
    judges: defaultdict[str, Counter[_Judge]] = defaultdict(Counter)
    for row in rows:
        for name, score in row["scores"].items():
            judges[name].update(_judge_of(score))
    faults = []
    for scorer, found in judges.items():
        if len(found) > 1:
            counted = ", ".join(f"{count} by {name}" for (_, name, _), count in found.most_common())
            faults.append(f"scores of {scorer} are by {len(found)} judges ({counted}); run again to have one")
        elif present and any(grader not in (None, present) for grader, *_ in found):
            faults.append(f"scores of {scorer} are by an earlier grader; run again once the present one answers")
    return faults


def _judge_of(score: Mapping[str, Any]) -> Iterator[_Judge]:
    """The judge of a score; none where none was asked or it failed."""
    judge = score["judge"] or {}
    if judge and score["status"] not in ("empty", "failed"):
        yield tuple(judge.get(key) for key in ("grader", "name", "prompt_sha256"))
