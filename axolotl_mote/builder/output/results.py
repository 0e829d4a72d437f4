"""Writes chains.jsonl, rejected.jsonl, manifest.json and statistics.html from questions and journal.

The two data files depend only on questions, journal and configuration, so two builds with the same texts write the
same bytes, whatever ended the run. The files appear together, each in one rename. Rows pass one at a time through files
without a name: memory does not hold them.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from axolotl_mote.benchmarks.sources import BENCHMARKS
from axolotl_mote.builder.loop.backlog import Backlog
from axolotl_mote.builder.loop.generator import Outcome
from axolotl_mote.builder.loop.journal import Journal
from axolotl_mote.builder.loop.replay import replay
from axolotl_mote.builder.output.report import write_html
from axolotl_mote.builder.output.statistics import summarize
from axolotl_mote.builder.settings import QuestionSource, Settings, config_hash, identity
from axolotl_mote.builder.texts.prompts import Prompts
from axolotl_mote.builder.texts.questions import Dropped
from axolotl_mote.builder.texts.similarity import SimilarTexts
from axolotl_mote.chain.questions import Question
from axolotl_mote.chain.steps import DEFAULT_STEPS, chain_form
from axolotl_mote.files import AtomicFiles, RowSpool, installed_versions

_PACKAGES = ("axolotl_mote", "torch", "transformers", "aiohttp", "tenacity", "jinja2", "datasets")


@dataclass(frozen=True)
class RunRecord:
    """One run as the manifest shows it."""

    started: float
    seconds: float
    requests: int
    tokens: int
    stopped: str | None


RESULTS = ("chains.jsonl", "rejected.jsonl", "manifest.json", "statistics.html")


def set_aside(folder: Path) -> list[Path]:
    """Rename the results of an earlier build to ``chains.N.jsonl`` and so on; returns the new paths."""
    number = 1
    while any(_numbered(folder / name, number).exists() for name in RESULTS):
        number += 1
    moved = [(folder / name, _numbered(folder / name, number)) for name in RESULTS if (folder / name).exists()]
    for path, target in moved:
        path.rename(target)
    return [target for _, target in moved]


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def write_results(
    settings: Settings,
    prompts: Prompts,
    journal: Journal,
    questions: Backlog,
    dropped: RowSpool,
    run: RunRecord,
    on_progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write all result files from what the journal holds.

    Args:
        settings, prompts, journal: The build.
        questions: In order; those whose outcome the journal does not hold are pending.
        dropped: Rows of ``rejected.jsonl`` for input that is not used.
        run: The run that ends.
        on_progress: Called with the number of questions done so far.

    Returns:
        The counts of the manifest.

    Raises:
        OSError: If the disk is full; the files of the run before then stay as they are.
    """
    folder = settings.output
    with RowSpool(folder) as chains, RowSpool(folder) as rejects, AtomicFiles() as files:
        for row in dropped:
            rejects.append(row)
        counts = _sort(settings, prompts, journal, questions, chains, rejects, on_progress)
        counts["dropped"] = dict(sorted(Counter(row["reason"] for row in dropped).items()))
        manifest = _manifest(settings, prompts, journal, counts, run)
        files.write_jsonl(folder / "chains.jsonl", chains)
        files.write_jsonl(folder / "rejected.jsonl", rejects)
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        files.write(folder / "manifest.json", [text.encode("utf-8", "replace")])
        page = folder / "statistics.html"
        if len(chains):
            write_html(page, summarize(chains, rejects), title=str(folder / "chains.jsonl"))
        else:
            page.unlink(missing_ok=True)
    return counts


def dropped_row(dropped: Dropped) -> dict[str, Any]:
    """The row of ``rejected.jsonl`` for input that is not used."""
    question = dropped.question
    return {
        "id": question.columns.get("id"),
        "messages": question.messages,
        "reason": dropped.reason,
        "source": dropped.source,
        "row": question.row,
    }


def _sort(
    settings: Settings,
    prompts: Prompts,
    journal: Journal,
    questions: Backlog,
    chains: RowSpool,
    rejects: RowSpool,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    """Fill the rows of both data files; of near-identical answers the first is kept. Returns the counts."""
    pending = neutralized = 0
    forms, reasons, verdicts, defects = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    answers = SimilarTexts(settings.deduplicate) if settings.deduplicate is not None else None
    given = Counter(name for question in questions if (name := _given_id(question)) is not None)
    for number, question in enumerate(questions, start=1):
        on_progress(number)
        outcome = replay(question, settings, prompts, journal)
        if outcome is None:
            pending += 1
            continue
        verdicts.update(outcome.verdicts)
        defects.update(outcome.defects)
        neutralized += outcome.neutralized
        name = _given_id(question)
        row = _row(outcome, name if name is not None and given[name] == 1 else question.id)
        answer, reason = outcome.texts.get("response", ""), outcome.reason
        if reason is None and answers is not None and answers.find(answer):
            reason = "near_duplicate_answer"
        if reason is not None:
            rejects.append({**row, "defects": outcome.defects, "reason": reason})
            reasons[reason] += 1
            continue
        if answers is not None:
            answers.add(question.id, answer)
        chains.append(row)
        forms[chain_form(step for step in DEFAULT_STEPS if step in outcome.texts)] += 1
    return {
        "questions": len(questions),
        "dropped": {},
        "kept": len(chains),
        "rejected": reasons.total(),
        "pending": pending,
        **{
            name: dict(sorted(counter.items()))
            for name, counter in (("forms", forms), ("reasons", reasons), ("verdicts", verdicts), ("defects", defects))
        },
        "control_tokens_broken_up": neutralized,
    }


def _given_id(question: Question) -> str | None:
    """The ``id`` that the source gives a row, which counts where it is unique."""
    given = question.columns.get("id")
    return None if given is None else str(given)


def _row(outcome: Outcome, name: str) -> dict[str, Any]:
    question = outcome.question
    columns = {key: value for key, value in question.columns.items() if key != "id"}
    return {
        "id": name,
        "question_id": question.id,
        "messages": question.messages,
        **{step: outcome.texts.get(step) for step in DEFAULT_STEPS},
        "check": outcome.check,
        "verdicts": outcome.verdicts,
        **columns,
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
        "inputs": dict(map(_input, (*settings.questions, *settings.exclude))),
        "counts": counts,
        "calls": dict(sorted(calls.items())),
        "answered_by": dict(sorted(answered.items())),
        "tokens": tokens,
        "finished": counts["pending"] == 0,
        "last_run": {**asdict(run), "started": started, "seconds": round(run.seconds, 1)},
        "versions": {"python": platform.python_version(), **installed_versions(_PACKAGES)},
    }


def _input(source: str | QuestionSource) -> tuple[str, str]:
    """Name and hash, or revision, of a source; a name alone is that of a benchmark."""
    if isinstance(source, str):
        return source, BENCHMARKS[source].sha256
    path = Path(source.path)
    if path.is_file():
        with path.open("rb") as file:
            return source.label, hashlib.file_digest(file, "sha256").hexdigest()
    return source.label, f"{source.name or 'default'}/{source.split}@{source.revision or 'latest'}"
