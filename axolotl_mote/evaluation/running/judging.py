"""The scores that answers lack: judged again, and nothing generated.

An answer needs it if a score is absent, failed, or of another judge, revision or prompt than now. It knows the log of
one cell at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from inspect_ai import score
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import Model

from axolotl_mote.evaluation.figures.measures import CHAIN
from axolotl_mote.evaluation.judges.prompts import prompt_sha256
from axolotl_mote.evaluation.results import COUNTS
from axolotl_mote.evaluation.running.cells import Job, is_graded, make_task, scorer_names
from axolotl_mote.evaluation.running.endpoints import grader_hash
from axolotl_mote.evaluation.running.logs import replace_log
from axolotl_mote.evaluation.settings import Settings

Tell = Callable[[str], None]
"""Called with a line of progress."""

_JUDGED_TOGETHER = 64
"""Answers judged again between two writes of a log."""


class JudgeAgain:
    """Finds answers without a score of the present judges, and judges them.

    Args:
        settings: For the grader.
        grader: The model of the LLM judges; None: what they judged before stays.
    """

    def __init__(self, settings: Settings, grader: Model | None) -> None:
        self._grader, self._hash = grader, grader_hash(settings)

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
        judge, kind = about.get("judge") or {}, name.removesuffix(CHAIN)
        if kind == "refusal":
            return bool(judge.get("revision") != self._refusal_revision)
        if not is_graded(name) or self._grader is None or about.get("status") == "empty":
            return False
        return other_grader or about.get("status") == "failed" or judge.get("prompt_sha256") != prompt_sha256(kind)

    def run(self, job: Job, path: Path, tell: Tell, display: str) -> int:
        """Judge what needs it, and write the log after every few answers.

        Returns:
            How many answers were judged.
        """
        task = make_task(job.spec)
        found = read_eval_log(str(path), resolve_attachments="full")
        places = self.stale(found, scorer_names(task))
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
            replace_log(found, path)
        return len(places)
