"""Logs of inspect_ai on disk: replaced whole or not at all, without API keys, one for each finished cell.

It knows what a log holds, not how it came about.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from inspect_ai.log import EvalLog, read_eval_log, recompute_metrics, write_eval_log

from axolotl_mote.evaluation.results import answered_count, without_secrets
from axolotl_mote.evaluation.running.cells import Job
from axolotl_mote.evaluation.settings import Settings

_SHORTEST_SECRET = 8
"""Characters; what is shorter is no secret but a placeholder such as EMPTY, and part of ordinary words."""

_ERRORS = frozenset({"error", "error_retries", "traceback", "traceback_ansi", "explanation", "call"})
"""Fields in which a server's words about a failed request end up; ``call`` is the request as it was sent."""

_ERROR_EVENTS = ("error", "logger")


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
    """API keys by the name of their variable, without placeholders."""
    found = {key: os.environ.get(key, "") for key in settings.key_variables()}
    return {key: secret for key, secret in found.items() if len(secret) >= _SHORTEST_SECRET}


def remove_secrets(job: Job, secrets: dict[str, str]) -> None:
    """Take API keys out of the errors in logs: some servers repeat them there. Answers stay as they are."""
    for path in job.logs() if secrets else ():
        if answered_count(path) is None:
            continue
        given = json.loads(read_eval_log(str(path), resolve_attachments="full").model_dump_json())
        clean = _without_secrets(given, secrets)
        if json.dumps(clean) != json.dumps(given):
            replace_log(EvalLog.model_validate(clean), path)


def _without_secrets(value: Any, secrets: dict[str, str], is_error: bool = False) -> Any:
    """Plain data without secrets in errors, and without colored tracebacks: color codes and line breaks hide one."""
    if isinstance(value, dict):
        is_error = is_error or value.get("event") in _ERROR_EVENTS
        return {
            key: "" if key == "traceback_ansi" else _without_secrets(part, secrets, is_error or key in _ERRORS)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(item, secrets, is_error) for item in value]
    return without_secrets(value, secrets) if is_error and isinstance(value, str) else value


def remove_superseded(job: Job) -> None:
    """Delete the logs of a cell that is complete, but the one with all answers."""
    best = job.best_log()
    for path in job.logs():
        if path != best:
            path.unlink(missing_ok=True)
