"""What there is to do: the cells of an evaluation, and how much of each is done.

Planning loads no model, asks no server and writes nothing; it reads prompts and hashes folders. What is done is read
from the logs, so nothing else has to be kept between two runs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inspect_ai import Task
from inspect_ai.util import registry_info

from axolotl_mote.evaluation import tasks as own_tasks
from axolotl_mote.evaluation.figures.cells import variant_name
from axolotl_mote.evaluation.figures.measures import CHAIN
from axolotl_mote.evaluation.judges.verdicts import PARSERS
from axolotl_mote.evaluation.results import Cell, answered_count
from axolotl_mote.evaluation.running.endpoints import grader_of, model_of
from axolotl_mote.evaluation.settings import (
    Settings,
    System,
    TaskSpec,
    answer_identity,
    endpoint_identity,
    identity_hash,
)
from axolotl_mote.files import raise_faults


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
        folder: Of its logs; that of an earlier name if the system or the task was renamed.
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
    try:
        if settings.grader and settings.grader.is_local:
            grader_of(settings)
    except (ValueError, OSError) as error:
        faults.append(f"grader: {error}")
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
    _find_earlier_logs(settings, jobs)
    return jobs


def _find_earlier_logs(settings: Settings, jobs: Sequence[Job]) -> None:
    """Give a cell without logs those of the same hash under a name that is in use no more: names are no part of it."""
    taken = {job.folder for job in jobs}
    for job in jobs:
        if job.logs():
            continue
        same = sorted((settings.output / "logs").glob(f"*/*/*-{identity_hash(job.identity)}"))
        if left := [folder for folder in same if folder not in taken and any(folder.glob("*.eval"))]:
            job.folder = left[0]
            taken.add(left[0])


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
        scorers=tuple(scorer_names(task)),
        data=data,
        task_version=version,
        folder=settings.output / "logs" / system.name / mode / f"{spec.title}-{identity_hash(identity)}",
    )


def is_graded(scorer: str) -> bool:
    """Whether a scorer asks the grader."""
    return scorer.removesuffix(CHAIN) in PARSERS


def _text(given: Any) -> str:
    return given if isinstance(given, str) else "\n".join(message.text for message in given)


def scorer_names(task: Task) -> list[str]:
    """Names of a task's scorers, as scores have them in logs."""
    return [registry_info(scorer).name.rpartition("/")[2] for scorer in task.scorer or []]
