"""Systems x modes x tasks through inspect_ai, one after another; then results.jsonl, summary.json and report.html.

A cell is one system in one mode on one task. Its logs are in a folder of their own, named after the hash of everything
that decides the answers, so that answers under other settings, data or weights are never taken for those of now. A cell
that was killed goes on from the log that holds the most answers. Answers that are there but lack a score of the present
judge are judged again without being generated again.

    output/runs.jsonl                           one line per run; locked while a run goes on
    output/logs/SYSTEM/MODE/TASK-HASH/*.eval    logs of inspect_ai
    output/manifest.json                        cells: what was planned, what is there, settings, versions
    output/results.jsonl, summary.json, report.html
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from inspect_ai import Task, score
from inspect_ai import eval as inspect_eval
from inspect_ai._eval.task.task import PreviousTask  # eval_retry makes model and judge anew from names in the log
from inspect_ai.log import EvalLog, read_eval_log, recompute_metrics, write_eval_log
from inspect_ai.model import GenerateConfig, Model, get_model

from axolotl_mote.evaluation import tasks as own_tasks
from axolotl_mote.evaluation.judges.prompts import prompt_sha256
from axolotl_mote.evaluation.judges.verdicts import PARSERS
from axolotl_mote.evaluation.page import write_report
from axolotl_mote.evaluation.results import COUNTS, Cell, answered_count, read_rows, without_secrets
from axolotl_mote.evaluation.settings import (
    NO_STEPS,
    Endpoint,
    Settings,
    System,
    TaskSpec,
    answer_identity,
    endpoint_identity,
    identity_hash,
)
from axolotl_mote.evaluation.summary import Summary, variant_name
from axolotl_mote.files import (
    AppendLog,
    AtomicFiles,
    RowSpool,
    installed_versions,
    parse_row,
    raise_faults,
    read_all_rows,
)

log = logging.getLogger(__name__)

Tell = Callable[[str], None]
Status = Literal["complete", "partial", "absent"]

_SERVICE = "openai-api/server"
_CHAIN = "_chain"
_NO_KEY = "AXOLOTL_MOTE_NO_KEY"
_FAILED_SHARE = 0.1
"""Share of failed requests after which a server counts as dead; its other prompts wait for the next run."""

_JUDGED_TOGETHER = 64
"""Answers judged again between two writes of a log."""

_FAULT_LENGTH = 300
_CHARS_PER_TOKEN = 4  # of English text; for estimates alone


# --- what there is to do --------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A cell and where it stands.

    Args:
        system, mode, spec: The cell.
        identity: Everything that decides its answers.
        planned: Answers wanted, by label.
        characters: Of all prompts.
        scorers: Names of its scorers.
        data, task_version: About the prompts, for the manifest.
        folder: Of its logs.
        fault: Why answers are missing.
    """

    system: System
    mode: str
    spec: TaskSpec
    identity: dict[str, Any]
    planned: dict[str, int]
    characters: int
    scorers: tuple[str, ...]
    data: dict[str, Any]
    task_version: int
    folder: Path
    fault: str | None = field(default=None)

    @property
    def name(self) -> str:
        """For messages."""
        return f"{variant_name((self.system.name, self.mode))}, {self.spec.title}"

    @property
    def total(self) -> int:
        """Answers wanted."""
        return sum(self.planned.values())

    def logs(self) -> list[Path]:
        """Its logs, oldest first."""
        return sorted(self.folder.glob("*.eval"))

    def best_log(self) -> Path | None:
        """The log with the most answers, the newest of equals; what cannot be read is left alone."""
        counts = [(answered_count(path), number, path) for number, path in enumerate(self.logs())]
        return max(
            ((count, number, path) for count, number, path in counts if count is not None), default=(0, 0, None)
        )[2]

    def answered(self) -> int:
        """Answers that are there."""
        best = self.best_log()
        return (answered_count(best) or 0) if best else 0

    def cell(self) -> Cell:
        """Where its results are."""
        return Cell(self.system.name, self.mode, self.spec.title, self.spec.name, self.best_log(), self.scorers)


def make_task(spec: TaskSpec) -> Task:
    """The inspect_ai task of a spec.

    Raises:
        ValueError: If its prompts cannot be read or an option is wrong.
    """
    made: Task = getattr(own_tasks, spec.name)(**spec.arguments)
    return made


def plan(settings: Settings) -> list[Job]:
    """All cells, in order. No model is loaded; folders are hashed.

    Raises:
        ValueError: If tasks or systems cannot be used; all of them at once.
    """
    faults: list[str] = []
    made: dict[str, Task] = {}
    for spec in settings.tasks:
        try:
            made[spec.title] = make_task(spec)
        except (ValueError, OSError) as error:
            faults.append(f"tasks.{spec.title}: {error}")
    for system in settings.systems:
        for mode in system.modes if system.is_local else ():
            try:
                model_of(settings, system, mode)  # reads folders, not weights
            except (ValueError, OSError) as error:
                faults.append(f"systems.{system.name}, {mode}: {error}")
    for key in settings.key_variables():
        if not os.environ.get(key):
            faults.append(f"api_key_env: {key} must be set in the environment; got nothing. Export it.")
    raise_faults(faults, "the evaluation file must name tasks and systems that can be used; got {faults}.")
    jobs = []
    for system in settings.systems:
        endpoint = endpoint_identity(system)
        jobs += [
            _job(settings, system, mode, spec, made[spec.title], endpoint)
            for mode in system.modes
            for spec in settings.tasks
        ]
    return jobs


def _job(settings: Settings, system: System, mode: str, spec: TaskSpec, task: Task, endpoint: dict[str, Any]) -> Job:
    about = task.metadata or {}
    data = dict(about.get("data", {}))
    version = int(about.get("task_version", 0))
    identity = answer_identity(
        settings, system, mode, spec, {"version": version, "sha256": data.get("sha256")}, endpoint
    )
    labels = Counter((sample.metadata or {}).get("label") or "" for sample in task.dataset)
    return Job(
        system=system,
        mode=mode,
        spec=spec,
        identity=identity,
        planned={label: count * settings.epochs for label, count in labels.items()},
        characters=sum(len(_text(sample.input)) for sample in task.dataset),
        scorers=tuple(_scorer_names(task)),
        data=data,
        task_version=version,
        folder=settings.output / "logs" / system.name / mode / f"{spec.title}-{identity_hash(identity)}",
    )


def _is_graded(scorer: str) -> bool:
    """Whether a scorer asks the grader."""
    return scorer.removesuffix(_CHAIN) in PARSERS


def _text(given: Any) -> str:
    return given if isinstance(given, str) else "\n".join(message.text for message in given)


def _scorer_names(task: Task) -> list[str]:
    from inspect_ai.util import registry_info

    return [registry_info(scorer).name.rpartition("/")[2] for scorer in task.scorer or []]


# --- models ---------------------------------------------------------------------------------------------------------


def model_of(settings: Settings, system: System, mode: str) -> Model:
    """The inspect_ai model of a system in one mode; nothing is loaded yet.

    Raises:
        ValueError: If the folder is no system, or lacks the steps.
    """
    sampling = settings.sampling
    config: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature:
        config["top_p"] = sampling.top_p
        if system.is_local or settings.epochs == 1:  # with one seed a server may answer alike in every epoch
            config["seed"] = sampling.seed
    arguments: dict[str, Any] = {"batch_size": settings.batch_size}
    if mode != NO_STEPS:
        arguments["steps"] = mode
    if system.check:
        arguments["check"] = True
    return _endpoint_model(system, config, arguments)


def grader_of(settings: Settings) -> Model | None:
    """The inspect_ai model of the LLM judges."""
    if settings.grader is None:
        return None
    return _endpoint_model(settings.grader, {}, {"batch_size": settings.batch_size})


def _endpoint_model(endpoint: Endpoint, config: dict[str, Any], arguments: dict[str, Any]) -> Model:
    """A model of its own for every cell: clients of servers do not survive the event loop of another one."""
    config["max_connections"] = endpoint.concurrency
    if endpoint.inspect_model:
        return get_model(endpoint.inspect_model, config=GenerateConfig(**config), memoize=False)
    if endpoint.server:
        key = endpoint.api_key_env or _NO_KEY
        os.environ.setdefault(_NO_KEY, "none")
        config["timeout"] = endpoint.retry_for
        if endpoint.extra_body:
            config["extra_body"] = endpoint.extra_body
        return get_model(
            f"{_SERVICE}/{endpoint.model}",
            config=GenerateConfig(**config),
            base_url=endpoint.server,
            memoize=False,
            api_key_var=key,
        )
    config["max_connections"] = 2 * arguments["batch_size"]  # one batch that is answered and one that waits
    arguments |= {"dtype": endpoint.dtype, "device": endpoint.device, "base_model": endpoint.base_model}
    given = {key: value for key, value in arguments.items() if value is not None}
    name = endpoint.adapter or endpoint.model
    return get_model(f"mote/{name}", config=GenerateConfig(**config), memoize=False, **given)


def server_fault(endpoint: Endpoint, timeout: float = 10.0) -> str | None:
    """Why a server does not answer; None if it does, whatever it says, or if there is none."""
    if endpoint.server is None:
        return None
    try:
        with urllib.request.urlopen(f"{endpoint.server.rstrip('/')}/models", timeout=timeout):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"{endpoint.server} does not answer: {error}"


@contextmanager
def _loaded(system: System) -> Iterator[None]:
    """Keep the weights of a local system between its cells, and free them afterwards."""
    if not system.is_local:
        yield
        return
    from axolotl_mote.evaluation.systems import acquire, find_system, release

    held = acquire(
        find_system(str(system.adapter or system.model), system.base_model, dtype=system.dtype, device=system.device)
    )
    try:
        yield
    finally:
        release(held)


# --- answering and judging ------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Ctrl-C while a cell was answered; what was finished is in its log."""


def answer(settings: Settings, job: Job, grader: Model | None, display: str) -> EvalLog:
    """Answer what a cell lacks; finished answers are taken over.

    Raises:
        Interrupted: On Ctrl-C.
    """
    task, model = make_task(job.spec), model_of(settings, job.system, job.mode)
    roles: dict[str, Any] | None = {"grader": grader} if grader is not None else None
    best = job.best_log()
    work: Any = task
    if best is not None:
        earlier = read_eval_log(str(best), resolve_attachments="full")
        work = PreviousTask(
            id=earlier.eval.task_id,
            task=task,
            task_args=earlier.eval.task_args,
            model=None,
            model_roles=None,
            sandbox=None,
            log=earlier,
            log_info=None,
        )
    job.folder.mkdir(parents=True, exist_ok=True)
    about = {"cell": identity_hash(job.identity), "grader": _grader_hash(settings)}
    logs = inspect_eval(
        work,
        model=model,
        model_roles=roles,
        metadata={**(task.metadata or {}), "axolotl_mote": about},
        epochs=settings.epochs,
        log_dir=str(job.folder),
        log_format="eval",
        log_buffer=1,
        log_realtime=False,
        log_model_api=False,
        fail_on_error=_FAILED_SHARE if job.system.server else False,
        score_display=False,
        display=display,
        log_level="warning",
        ctl_server=False,
    )
    if not logs or logs[0].status == "cancelled":
        raise Interrupted
    return logs[0]


def _grader_hash(settings: Settings) -> str | None:
    return identity_hash(endpoint_identity(settings.grader)) if settings.grader else None


class JudgeAgain:
    """Finds answers without a score of the present judges, and judges them.

    Args:
        settings: For the grader.
        grader: The model of the LLM judges; None: what they judged before stays.
    """

    def __init__(self, settings: Settings, grader: Model | None) -> None:
        self._grader, self._hash = grader, _grader_hash(settings)

    @cached_property
    def _refusal_revision(self) -> str:
        from axolotl_mote.evaluation.judges.refusal import RefusalJudge

        return str(RefusalJudge.load().revision)

    def stale(self, found: EvalLog, names: Sequence[str]) -> list[int]:
        """Positions of samples that need it.

        Args:
            found: The whole log of a cell.
            names: Its scorers.
        """
        graded_by = ((found.eval.metadata or {}).get("axolotl_mote") or {}).get("grader")
        other_grader = self._grader is not None and graded_by != self._hash
        places = []
        for place, sample in enumerate(found.samples or []):
            if sample.error or sample.output is None or not sample.output.choices:
                continue
            if any(self._is_stale(name, (sample.scores or {}).get(name), other_grader) for name in names):
                places.append(place)
        return places

    def _is_stale(self, name: str, given: Any, other_grader: bool) -> bool:
        if given is None or name == COUNTS:
            return given is None
        about = given.metadata or {}
        judge, kind = about.get("judge") or {}, name.removesuffix(_CHAIN)
        if kind == "refusal":
            return bool(judge.get("revision") != self._refusal_revision)
        if not _is_graded(name) or self._grader is None or about.get("status") == "empty":
            return False
        return other_grader or about.get("status") == "failed" or judge.get("prompt_sha256") != prompt_sha256(kind)

    def run(self, job: Job, path: Path, tell: Tell, display: str) -> int:
        """Judge what needs it, and write the log after every few answers.

        Returns:
            How many answers were judged.
        """
        task = make_task(job.spec)
        found = read_eval_log(str(path), resolve_attachments="full")
        places = self.stale(found, _scorer_names(task))
        if not places or found.samples is None:
            return 0
        tell(f"{job.name}: judging {len(places)} answers again")
        roles: dict[str, Any] | None = {"grader": self._grader} if self._grader is not None else None
        for start in range(0, len(places), _JUDGED_TOGETHER):
            chosen = places[start : start + _JUDGED_TOGETHER]
            part = found.model_copy(update={"samples": [found.samples[place] for place in chosen]})
            judged = score(
                part,
                task.scorer or [],
                model="none/none",
                model_roles=roles,
                action="overwrite",
                display=display,
            )
            for place, sample in zip(chosen, judged.samples or [], strict=True):
                found.samples[place] = sample
            if start + len(chosen) == len(places):
                about = (found.eval.metadata or {}).get("axolotl_mote") or {}
                if self._grader is not None:
                    found.eval.metadata = {
                        **(found.eval.metadata or {}),
                        "axolotl_mote": {**about, "grader": self._hash},
                    }
            _replace_log(found, path)
        return len(places)


def _replace_log(found: EvalLog, path: Path) -> None:
    """Write a log beside its place, then rename it."""
    if found.results is not None:
        recompute_metrics(found)
    staged = path.with_name(f".{path.name}.tmp.eval")
    try:
        write_eval_log(found, str(staged))
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _secrets(settings: Settings) -> dict[str, str]:
    """API keys by the name of their variable."""
    found = {key: os.environ.get(key, "") for key in settings.key_variables()}
    return {key: secret for key, secret in found.items() if secret}


def _remove_secrets(job: Job, secrets: dict[str, str]) -> None:
    """Take API keys out of logs: some servers repeat them in errors."""
    for path in job.logs() if secrets else ():
        text = read_eval_log(str(path), resolve_attachments="full").model_dump_json()
        clean = _without_secrets(json.loads(text), secrets)
        if clean != json.loads(text):
            _replace_log(EvalLog.model_validate(clean), path)


def _without_secrets(value: Any, secrets: dict[str, str]) -> Any:
    """Plain data without secrets, and without colored tracebacks: color codes and line breaks would hide one there."""
    if isinstance(value, dict):
        return {k: "" if k == "traceback_ansi" else _without_secrets(v, secrets) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item, secrets) for item in value]
    return without_secrets(value, secrets) if isinstance(value, str) else value


def _remove_superseded(job: Job) -> None:
    """Delete the logs of a cell that is complete, but the one with all answers."""
    best = job.best_log()
    for path in job.logs():
        if path != best:
            path.unlink(missing_ok=True)


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What a run leaves behind.

    Args:
        summary: The figures.
        faults: What is missing, and why.
        interrupted: Whether Ctrl-C stopped it.
        answered, judged: Answers given, and judged again, by this run.
        seconds: Of this run.
    """

    summary: Summary
    faults: list[str]
    interrupted: bool
    answered: int
    judged: int
    seconds: float


def run(settings: Settings, *, tell: Tell = lambda _: None, display: str = "none") -> Report:
    """Run an evaluation, or continue one, and write its results.

    Args:
        settings: The evaluation.
        tell: Called with a line of progress.
        display: How inspect_ai shows progress: none, plain, rich or full.

    Raises:
        FileInUseError: If another run uses the output folder.
        ValueError: If tasks or systems cannot be used.
    """
    began = time.monotonic()
    jobs = plan(settings)
    answered = judged = 0
    interrupted = False
    with AppendLog(settings.output / "runs.jsonl", begins=b'{"') as runs:
        runs.append([_run_record(settings)])
        judging = _Judging(settings, jobs, tell)
        try:
            for system in settings.systems:
                mine = [job for job in jobs if job.system is system]
                for record in _run_system(settings, system, mine, judging, tell, display):
                    runs.append([record])
                    answered, judged = answered + record["answered"], judged + record["judged"]
        except (Interrupted, KeyboardInterrupt):
            interrupted = True
            tell("Interrupted. Writing the results of what is there.")
        summary, faults = write_results(settings, jobs)
    return Report(summary, [*judging.faults, *faults], interrupted, answered, judged, time.monotonic() - began)


class _Judging:
    """The grader, if it answers."""

    def __init__(self, settings: Settings, jobs: Sequence[Job], tell: Tell) -> None:
        self._settings = settings
        self.faults: list[str] = []
        fault = server_fault(settings.grader) if settings.grader else None
        self._alive = settings.grader is not None and fault is None
        if settings.grader is None and any(_is_graded(name) for job in jobs for name in job.scorers):
            tell("There is no grader: what only it can judge stays unscored. Add grader: to the evaluation file.")
        if fault:
            self.faults.append(f"grader: {fault}. Its scores are missing; run again once it answers.")
            tell(self.faults[-1])

    def grader(self) -> Model | None:
        """A new model for a cell."""
        return grader_of(self._settings) if self._alive else None


def _run_system(
    settings: Settings, system: System, jobs: Sequence[Job], judging: _Judging, tell: Tell, display: str
) -> Iterator[dict[str, Any]]:
    """Answer and judge the cells of a system; yields what was done, for runs.jsonl."""
    missing = any(job.answered() < job.total for job in jobs)
    fault = server_fault(system) if missing else None
    if fault:
        tell(f"{system.name}: {fault}. Going on with the next system.")
    with _loaded(system) if missing and not fault else nullcontext():
        for job in jobs:
            before, began, judged = job.answered(), time.monotonic(), 0
            if before < job.total:
                job.fault = fault
            if before < job.total and not fault:
                tell(f"{job.name}: {job.total - before} of {job.total} answers to generate")
                _answer(settings, job, judging, tell, display)
            answered, seconds = job.answered() - before, time.monotonic() - began
            best = job.best_log()
            if best is not None:
                judged = JudgeAgain(settings, judging.grader()).run(job, best, tell, display)
            if before + answered == job.total:
                _remove_superseded(job)
            if answered or judged:
                name = {"system": system.name, "mode": job.mode, "task": job.spec.title}
                yield {**name, "answered": answered, "seconds": round(seconds, 3), "judged": judged}


def _answer(settings: Settings, job: Job, judging: _Judging, tell: Tell, display: str) -> None:
    made = answer(settings, job, judging.grader(), display)
    if made.status == "error" and made.error is not None:
        message = without_secrets(made.error.message.strip(), _secrets(settings))
        job.fault = message if len(message) <= _FAULT_LENGTH else f"... {message[-_FAULT_LENGTH:]}"
        tell(f"{job.name}: stopped: {job.fault}")
    _remove_secrets(job, _secrets(settings))
    tell(f"{job.name}: {job.answered()} of {job.total} answers")


def _run_record(settings: Settings) -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What decides figures besides the settings."""
    packages = ("axolotl_mote", "inspect-ai", "torch", "transformers", "peft", "numpy")
    return {"python": platform.python_version(), **installed_versions(packages)}


# --- results --------------------------------------------------------------------------------------------------------


def write_results(settings: Settings, jobs: Sequence[Job]) -> tuple[Summary, list[str]]:
    """Write manifest, results, summary and page from all logs.

    Returns:
        The figures, and what is missing.
    """
    secrets = _secrets(settings)
    cells, faults = [], []
    with RowSpool(settings.output) as rows:
        for job in jobs:
            cell, count, errors, unjudged = job.cell(), 0, 0, 0
            for row in read_rows(cell, secrets):
                rows.append(row)
                count += row["error"] is None
                errors += row["error"] is not None
                unjudged += any(s["status"] == "failed" for s in row["scores"].values())
            status: Status = "complete" if count == job.total else "partial" if count else "absent"
            cells.append(_manifest_cell(settings, job, cell, status))
            if status != "complete":
                why = f": {job.fault}" if job.fault else f": {errors} failed" if errors else ""
                faults.append(f"{job.name}: {job.total - count} of {job.total} answers are missing{why}")
            if unjudged and settings.grader:
                faults.append(f"{job.name}: the judge failed on {unjudged} of {count} answers")
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


# --- what it would cost ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What is left to do for a cell.

    Args:
        name: The cell.
        prompts: Of the task.
        answers: To generate.
        judge_calls: To the grader.
        prompt_tokens: Of those answers' prompts; an estimate from their characters.
        tokens: To generate, by earlier answers of the system in this mode; None if there are none.
        most_tokens: The most that can be generated.
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
    """What a run would do now. Nothing is loaded, asked or written.

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
                judge_calls=left * sum(map(_is_graded, job.scorers)) if settings.grader else 0,
                prompt_tokens=round(job.characters * settings.epochs / job.total * left / _CHARS_PER_TOKEN),
                tokens=round(left * sum(known) / len(known)) if known else None,
                most_tokens=left * settings.max_new_tokens,
                seconds=left * rate if rate is not None else None,
            )
        )
    return found


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
