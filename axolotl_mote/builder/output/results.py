"""Writes chains.jsonl, rejected.jsonl, manifest.json and statistics.html from the outcomes of a build.

The two data files depend only on questions, journal and configuration, so two builds with the same texts write the same
bytes. Each file appears in one rename.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from axolotl_mote.builder.loop.generator import Outcome
from axolotl_mote.builder.loop.journal import Journal
from axolotl_mote.builder.output.report import write_html
from axolotl_mote.builder.output.statistics import summarize
from axolotl_mote.builder.settings import QuestionSource, Settings, config_hash, identity
from axolotl_mote.builder.texts.prompts import Prompts
from axolotl_mote.builder.texts.questions import Dropped
from axolotl_mote.builder.texts.similarity import SimilarTexts
from axolotl_mote.chain.questions import Question
from axolotl_mote.chain.steps import DEFAULT_STEPS, chain_form
from axolotl_mote.files import installed_versions, write_atomically, write_jsonl

_PACKAGES = ("axolotl_mote", "torch", "transformers", "openai", "tenacity", "jinja2", "datasketch", "datasets")


@dataclass(frozen=True)
class RunRecord:
    """One run as the manifest shows it."""

    started: float
    seconds: float
    requests: int
    tokens: int
    stopped: str | None


def write_results(
    settings: Settings,
    prompts: Prompts,
    journal: Journal,
    questions: Sequence[Question],
    dropped: Sequence[Dropped],
    outcomes: dict[str, Outcome],
    run: RunRecord,
) -> dict[str, Any]:
    """Write all result files.

    Args:
        settings, prompts, journal: The build.
        questions: In order; those without an outcome are pending.
        dropped: Input rows that are not used.
        outcomes: Outcomes by question id.
        run: The run that ends.

    Returns:
        The counts of the manifest.
    """
    kept, rejected = sort_outcomes([outcomes[q.id] for q in questions if q.id in outcomes], settings.deduplicate)
    names = row_ids(questions)
    chains = [_row(outcome, names) for outcome in kept]
    rejects = [_dropped_row(row) for row in dropped]
    rejects += [{**_row(outcome, names), "defects": outcome.defects, "reason": reason} for outcome, reason in rejected]
    folder = settings.output
    write_jsonl(folder / "chains.jsonl", chains)
    write_jsonl(folder / "rejected.jsonl", rejects)
    counts = _counts(questions, dropped, outcomes, kept, rejected)
    manifest = _manifest(settings, prompts, journal, counts, run)
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    if chains:
        write_html(folder / "statistics.html", summarize(chains, rejects), title=str(folder / "chains.jsonl"))
    return counts


def sort_outcomes(
    outcomes: Iterable[Outcome], deduplicate: float | None
) -> tuple[list[Outcome], list[tuple[Outcome, str]]]:
    """Split outcomes into those kept and those rejected with a reason; of near-identical answers the first is kept."""
    kept, rejected = [], []
    answers = SimilarTexts(deduplicate)
    for outcome in outcomes:
        answer = outcome.texts.get("response", "")
        if outcome.reason is not None:
            rejected.append((outcome, outcome.reason))
        elif deduplicate is not None and answers.find(answer):
            rejected.append((outcome, "near_duplicate_answer"))
        else:
            answers.add(outcome.question.id, answer)
            kept.append(outcome)
    return kept, rejected


def row_ids(questions: Sequence[Question]) -> dict[str, str]:
    """The id of each row by question id: the source's ``id`` where it is unique, else the question's own."""
    given = {q.id: str(q.columns["id"]) for q in questions if q.columns.get("id") is not None}
    uses = Counter(given.values())
    return {q.id: given[q.id] if uses[given.get(q.id, "")] == 1 else q.id for q in questions}


def _row(outcome: Outcome, names: dict[str, str]) -> dict[str, Any]:
    question = outcome.question
    columns = {key: value for key, value in question.columns.items() if key != "id"}
    return {
        "id": names[question.id],
        "question_id": question.id,
        "messages": question.messages,
        **{step: outcome.texts.get(step) for step in DEFAULT_STEPS},
        "check": outcome.check,
        "verdicts": outcome.verdicts,
        **columns,
    }


def _dropped_row(dropped: Dropped) -> dict[str, Any]:
    question = dropped.question
    return {
        "id": question.columns.get("id"),
        "messages": question.messages,
        "reason": dropped.reason,
        "source": dropped.source,
        "row": question.row,
    }


def _counts(
    questions: Sequence[Question],
    dropped: Sequence[Dropped],
    outcomes: dict[str, Outcome],
    kept: Sequence[Outcome],
    rejected: Sequence[tuple[Outcome, str]],
) -> dict[str, Any]:
    every = outcomes.values()
    forms = [chain_form(step for step in DEFAULT_STEPS if step in outcome.texts) for outcome in kept]
    return {
        "questions": len(questions),
        "dropped": dict(sorted(Counter(row.reason for row in dropped).items())),
        "kept": len(kept),
        "rejected": len(rejected),
        "pending": len(questions) - len(outcomes),
        "forms": dict(sorted(Counter(forms).items())),
        "reasons": dict(sorted(Counter(reason for _, reason in rejected).items())),
        "verdicts": dict(sorted(Counter(verdict for o in every for verdict in o.verdicts).items())),
        "defects": dict(sorted(Counter(fault for o in every for fault in o.defects).items())),
        "control_tokens_broken_up": sum(o.neutralized for o in every),
    }


def _manifest(
    settings: Settings, prompts: Prompts, journal: Journal, counts: dict[str, Any], run: RunRecord
) -> dict[str, Any]:
    what = identity(settings, prompts.hashes)
    calls: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    tokens = {"prompt": 0, "completion": 0}
    for key, completion in journal.completions():
        calls[key.split("/")[1].split(".")[0]] += 1
        answered[completion.model] += 1
        tokens["prompt"] += completion.prompt_tokens
        tokens["completion"] += completion.completion_tokens
    started = datetime.fromtimestamp(run.started, UTC).isoformat(timespec="seconds")
    return {
        "config": config_hash(what),
        "identity": what,
        "settings": settings.model_dump(mode="json"),
        "prompts": {
            stage: {"file": prompts.files[stage], "sha256_16": prompts.hashes[stage]} for stage in prompts.hashes
        },
        "inputs": {s.label: _input_hash(s) for s in (*settings.questions, *settings.exclude)},
        "counts": counts,
        "calls": dict(sorted(calls.items())),
        "answered_by": dict(sorted(answered.items())),
        "tokens": tokens,
        "finished": counts["pending"] == 0,
        "last_run": {**asdict(run), "started": started, "seconds": round(run.seconds, 1)},
        "versions": {"python": platform.python_version(), **installed_versions(_PACKAGES)},
    }


def _input_hash(source: QuestionSource) -> str:
    path = Path(source.path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return f"{source.name or 'default'}/{source.split}@{source.revision or 'latest'}"
