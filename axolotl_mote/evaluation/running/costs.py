"""What a run would cost now: answers, calls of the grader, tokens, time.

No model is loaded or asked, and nothing is written. Tokens and time come from earlier answers; where there
are none, they are unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from inspect_ai.log import read_eval_log

from axolotl_mote.chain.steps import VERIFY
from axolotl_mote.evaluation.results import name_graders
from axolotl_mote.evaluation.running.cells import Job, is_graded, plan
from axolotl_mote.evaluation.running.endpoints import grader_of
from axolotl_mote.evaluation.running.judging import JudgeAgain
from axolotl_mote.evaluation.settings import Settings
from axolotl_mote.files import parse_row, read_all_rows

_CHARS_PER_TOKEN = 4
"""Of English text; for estimates alone."""


@dataclass(frozen=True)
class Cost:
    """What is left to do for a cell.

    Args:
        name: The cell.
        prompts: Of the task.
        answers: To generate.
        judge_calls: To the grader: for answers to generate, and for those whose scores are of another grader or absent.
        prompt_tokens: Of those answers' prompts; an estimate from their characters.
        tokens: To generate, by earlier answers of the system in this mode; None if there are none.
        most_tokens: The most that can be generated, all attempts of verify mode included.
        seconds: By earlier runs of the system; None if there are none.
    """

    name: str
    prompts: int
    answers: int
    judge_calls: int
    prompt_tokens: int
    tokens: int | None
    most_tokens: int
    seconds: float | None


def costs(settings: Settings) -> list[Cost]:
    """What a run would do now. No model is loaded or asked, and nothing is written.

    Raises:
        ValueError: As ``run``.
    """
    jobs = plan(settings)
    rates = _rates(settings.output / "runs.jsonl")
    lengths: dict[tuple[str, str], list[int]] = {}
    results = settings.output / "results.jsonl"
    for row in read_all_rows(results) if results.exists() else ():
        if row["output_tokens"] is not None:
            lengths.setdefault((row["system"], row["steps"]), []).append(row["output_tokens"])
    judges = JudgeAgain(settings, grader_of(settings))
    found = []
    for job in jobs:
        left = job.total - job.answered()
        variant = job.system.name, job.mode
        known, rate = lengths.get(variant), rates.get(variant)
        found.append(
            Cost(
                name=job.name,
                prompts=job.total // settings.epochs,
                answers=left,
                judge_calls=left * sum(map(is_graded, job.scorers)) + _judged_again(judges, job)
                if settings.grader
                else 0,
                prompt_tokens=round(job.characters * settings.epochs / job.total * left / _CHARS_PER_TOKEN),
                tokens=round(left * sum(known) / len(known)) if known else None,
                most_tokens=left * settings.max_new_tokens * _attempts(job),
                seconds=left * rate if rate is not None else None,
            )
        )
    return found


def _judged_again(judges: JudgeAgain, job: Job) -> int:
    """Calls of the grader for answers that are there."""
    best = job.best_log()
    if best is None:
        return 0
    log = read_eval_log(str(best), resolve_attachments="full")
    name_graders(log)
    return sum(is_graded(name) for names in judges.stale(log, job.scorers).values() for name in names)


def _attempts(job: Job) -> int:
    """How often verify mode may answer, with one reasoning step more each time; 1 in every other mode."""
    if job.mode != VERIFY:
        return 1
    from axolotl_mote.evaluation.systems import find_system, vocabulary_of

    name = str(job.system.adapter or job.system.model)
    vocabulary = vocabulary_of(find_system(name, job.system.base_model))
    return len(vocabulary.fixed_forms()) if vocabulary is not None else 1


def _rates(path: Path) -> dict[tuple[str, str], float]:
    """Seconds per answer of earlier runs, by system and mode."""
    totals: dict[tuple[str, str], list[float]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        record = parse_row(line)
        if isinstance(record, dict) and record.get("answered"):
            total = totals.setdefault((record["system"], record["mode"]), [0.0, 0.0])
            total[0] += record["seconds"]
            total[1] += record["answered"]
    return {key: seconds / count for key, (seconds, count) in totals.items()}
