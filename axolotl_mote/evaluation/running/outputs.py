"""What a run leaves behind: all logs to manifest.json, results.jsonl, summary.json and report.html.

It reads logs and asks no model, so it gives the same files for the same logs.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from typing import Any, Literal

from axolotl_mote.evaluation.figures.summary import Summary
from axolotl_mote.evaluation.page.files import write_report
from axolotl_mote.evaluation.results import Cell, answered_count, read_rows
from axolotl_mote.evaluation.running.cells import Job
from axolotl_mote.evaluation.running.logs import secrets_of
from axolotl_mote.evaluation.settings import Settings, endpoint_identity, identity_hash
from axolotl_mote.files import AtomicFiles, RowSpool, installed_versions

Status = Literal["complete", "partial", "absent"]


def versions() -> dict[str, str]:
    """What decides figures besides the settings."""
    packages = ("axolotl_mote", "inspect-ai", "torch", "transformers", "peft", "numpy")
    return {"python": platform.python_version(), **installed_versions(packages)}


def write_results(settings: Settings, jobs: Sequence[Job], faults: Sequence[str] = ()) -> Summary:
    """Write manifest, results, summary and page from all logs.

    Args:
        settings: The evaluation.
        jobs: All cells.
        faults: What is missing from more than one cell, in words.
    """
    secrets = secrets_of(settings)
    cells = []
    with RowSpool(settings.output) as rows:
        for job in jobs:
            cell, count = job.cell(), 0
            for row in read_rows(cell, secrets):
                rows.append(row)
                count += row["error"] is None
            status: Status = "complete" if count == job.total else "partial" if count else "absent"
            cells.append(_manifest_cell(settings, job, cell, status))
        manifest = {
            "cells": cells,
            "grader": endpoint_identity(settings.grader) if settings.grader else None,
            "seed": settings.sampling.seed,
            "versions": versions(),
            "machine": {"system": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()},
            "faults": list(faults),
        }
        with AtomicFiles() as files:
            files.write_jsonl(settings.output / "results.jsonl", rows)
            files.write(settings.output / "manifest.json", [(json.dumps(manifest, indent=2) + "\n").encode()])
        return write_report(settings.output, manifest, rows)


def _damaged(job: Job) -> list[str]:
    return [str(path) for path in job.logs() if answered_count(path) is None]


def _manifest_cell(settings: Settings, job: Job, cell: Cell, status: Status) -> dict[str, Any]:
    return {
        "system": job.system.name,
        "steps": job.mode,
        "task": job.spec.title,
        "benchmark": job.spec.name,
        "task_version": job.task_version,
        "model": job.system.label,
        "status": status,
        "fault": job.fault,
        "damaged": _damaged(job),
        "planned": job.planned,
        "data": job.data,
        "identity": job.identity,
        "hash": identity_hash(job.identity),
        "log": str(cell.log.relative_to(settings.output)) if cell.log else None,
    }
