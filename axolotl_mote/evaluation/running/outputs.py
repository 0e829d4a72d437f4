"""What a run leaves behind: all logs to manifest.json, results.jsonl, summary.json and report.html.

It reads logs and asks no model, so it gives the same files for the same logs.
"""

from __future__ import annotations

import json
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from axolotl_mote.evaluation.figures.summary import Summary
from axolotl_mote.evaluation.page.files import write_report
from axolotl_mote.evaluation.results import Cell, answered_count, read_rows
from axolotl_mote.evaluation.running.cells import Job
from axolotl_mote.evaluation.running.endpoints import grader_hash
from axolotl_mote.evaluation.running.logs import secrets_of
from axolotl_mote.evaluation.settings import Settings, endpoint_identity, identity_hash
from axolotl_mote.files import AtomicFiles, RowSpool, installed_versions

Status = Literal["complete", "partial", "absent"]


Judge = tuple[str | None, ...]
"""What tells judges apart: grader, name, its prompt."""


def versions() -> dict[str, str]:
    """What decides figures besides the settings."""
    packages = ("axolotl_mote", "inspect-ai", "torch", "transformers", "peft", "numpy")
    return {"python": platform.python_version(), **installed_versions(packages)}


def write_results(settings: Settings, jobs: Sequence[Job]) -> tuple[Summary, list[str]]:
    """Write manifest, results, summary and page from all logs.

    Returns:
        The figures, and what is missing.
    """
    secrets = secrets_of(settings)
    cells, faults = [], []
    with RowSpool(settings.output) as rows:
        for job in jobs:
            cell, count, errors, unjudged = job.cell(), 0, 0, 0
            judges: defaultdict[str, Counter[Judge]] = defaultdict(Counter)
            for row in read_rows(cell, secrets):
                rows.append(row)
                count += row["error"] is None
                errors += row["error"] is not None
                unjudged += any(s["status"] == "failed" for s in row["scores"].values())
                for name, score in row["scores"].items():
                    judges[name].update(_judge_of(score))
            status: Status = "complete" if count == job.total else "partial" if count else "absent"
            cells.append(_manifest_cell(settings, job, cell, status))
            if status != "complete":
                why = f": {job.fault}" if job.fault else f": {errors} failed" if errors else ""
                faults.append(f"{job.name}: {job.total - count} of {job.total} answers are missing{why}")
            if unjudged and settings.grader:
                faults.append(f"{job.name}: the judge failed on {unjudged} of {count} answers")
            faults += [f"{job.name}: {fault}" for fault in _judge_faults(judges, grader_hash(settings))]
            faults += [f"{job.name}: {path} cannot be read; it was left out" for path in _damaged(job)]
        manifest = {
            "cells": cells,
            "grader": endpoint_identity(settings.grader) if settings.grader else None,
            "seed": settings.sampling.seed,
            "versions": versions(),
            "machine": {"system": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()},
        }
        with AtomicFiles() as files:
            files.write_jsonl(settings.output / "results.jsonl", rows)
            files.write(settings.output / "manifest.json", [(json.dumps(manifest, indent=2) + "\n").encode()])
        summary = write_report(settings.output, manifest, rows)
    return summary, faults


def _judge_of(score: Mapping[str, Any]) -> Iterable[Judge]:
    """The judge of a score; none where none was asked or it failed."""
    judge = score["judge"] or {}
    if judge and score["status"] not in ("empty", "failed"):
        yield tuple(judge.get(key) for key in ("grader", "name", "prompt_sha256"))


def _judge_faults(judges: Mapping[str, Counter[Judge]], present: str | None) -> list[str]:
    """Scores that must not be averaged, or are not by the grader of the evaluation file."""
    faults = []
    for scorer, found in judges.items():
        if len(found) > 1:
            counted = ", ".join(f"{count} by {name}" for (_, name, _), count in found.most_common())
            faults.append(f"scores of {scorer} are by {len(found)} judges ({counted}); run again to have one")
        elif present and any(grader not in (None, present) for grader, *_ in found):
            faults.append(f"scores of {scorer} are by an earlier grader; run again once the present one answers")
    return faults


def _damaged(job: Job) -> list[Path]:
    return [path for path in job.logs() if answered_count(path) is None]


def _manifest_cell(settings: Settings, job: Job, cell: Cell, status: Status) -> dict[str, Any]:
    return {
        "system": job.system.name,
        "steps": job.mode,
        "task": job.spec.title,
        "benchmark": job.spec.name,
        "task_version": job.task_version,
        "model": job.system.label,
        "status": status,
        "planned": job.planned,
        "data": job.data,
        "identity": job.identity,
        "hash": identity_hash(job.identity),
        "log": str(cell.log.relative_to(settings.output)) if cell.log else None,
    }
