"""Logs of inspect_ai on disk: replaced whole or not at all, without API keys, one for each finished cell.

It knows what a log holds, not how it came about.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from inspect_ai.log import EvalLog, read_eval_log, recompute_metrics, write_eval_log

from axolotl_mote.evaluation.results import without_secrets
from axolotl_mote.evaluation.running.cells import Job
from axolotl_mote.evaluation.settings import Settings


def replace_log(found: EvalLog, path: Path) -> None:
    """Write a log beside its place, then rename it."""
    if found.results is not None:
        recompute_metrics(found)
    staged = path.with_name(f".{path.name}.tmp.eval")
    try:
        write_eval_log(found, str(staged))
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def secrets_of(settings: Settings) -> dict[str, str]:
    """API keys by the name of their variable."""
    found = {key: os.environ.get(key, "") for key in settings.key_variables()}
    return {key: secret for key, secret in found.items() if secret}


def remove_secrets(job: Job, secrets: dict[str, str]) -> None:
    """Take API keys out of logs: some servers repeat them in errors."""
    for path in job.logs() if secrets else ():
        text = read_eval_log(str(path), resolve_attachments="full").model_dump_json()
        clean = _without_secrets(json.loads(text), secrets)
        if clean != json.loads(text):
            replace_log(EvalLog.model_validate(clean), path)


def _without_secrets(value: Any, secrets: dict[str, str]) -> Any:
    """Plain data without secrets, and without colored tracebacks: color codes and line breaks would hide one there."""
    if isinstance(value, dict):
        return {k: "" if k == "traceback_ansi" else _without_secrets(v, secrets) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item, secrets) for item in value]
    return without_secrets(value, secrets) if isinstance(value, str) else value


def remove_superseded(job: Job) -> None:
    """Delete the logs of a cell that is complete, but the one with all answers."""
    best = job.best_log()
    for path in job.logs():
        if path != best:
            path.unlink(missing_ok=True)
