"""Logs of inspect_ai on disk: replaced whole or not at all, without API keys, one for each finished cell.

inspect_ai writes the names of scorers without their package and then cannot find them (``as_scorer_spec`` and
``scorer_from_spec`` of 0.3.285). Logs here have the whole names, so that ``inspect score LOG`` needs no ``--scorer``.

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

_PACKAGE = "axolotl_mote/"


def replace_log(found: EvalLog, path: Path) -> None:
    """Write a log beside its place, then rename it."""
    _name_scorers(found, "")  # scores go by short names
    if found.results is not None:
        recompute_metrics(found)
    _name_scorers(found, _PACKAGE)
    staged = path.with_name(f".{path.name}.tmp.eval")
    try:
        write_eval_log(found, str(staged))
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _name_scorers(found: EvalLog, package: str) -> None:
    for scorer in found.eval.scorers or []:
        scorer.name = package + scorer.name.removeprefix(_PACKAGE)


def secrets_of(settings: Settings) -> dict[str, str]:
    """API keys by the name of their variable, without placeholders."""
    found = {key: os.environ.get(key, "") for key in settings.key_variables()}
    return {key: secret for key, secret in found.items() if len(secret) >= _SHORTEST_SECRET}


def tidy_logs(job: Job, secrets: dict[str, str]) -> None:
    """Write whole names of scorers, and take API keys out of errors: some servers repeat them. No answer changes."""
    for path in job.logs():
        if answered_count(path) is None:
            continue
        found = read_eval_log(str(path), resolve_attachments="full")
        has_names = all(scorer.name.startswith(_PACKAGE) for scorer in found.eval.scorers or [])
        given = json.loads(found.model_dump_json()) if secrets else None
        clean = _without_secrets(given, secrets)
        if json.dumps(clean) != json.dumps(given):
            replace_log(EvalLog.model_validate(clean), path)
        elif not has_names:
            replace_log(found, path)


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
