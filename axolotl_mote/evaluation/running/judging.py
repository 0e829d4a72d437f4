"""The scores that answers lack: judged again, and nothing generated.

An answer needs it if a score is absent, failed, or of another judge, revision or prompt than now. Only such scores are
given anew. It knows the log of one cell at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from inspect_ai import score
from inspect_ai.log import EvalLog, EvalSample, read_eval_log
from inspect_ai.model import Model
from inspect_ai.scorer import Score, Scorer

from axolotl_mote.evaluation.figures.measures import CHAIN
from axolotl_mote.evaluation.judges.prompts import prompt_sha256
from axolotl_mote.evaluation.results import COUNTS, name_graders
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

    def stale(self, found: EvalLog, names: Sequence[str]) -> dict[int, tuple[str, ...]]:
        """What must be judged.

        Args:
            found: The whole log of a cell, its graders named in its scores.
            names: Its scorers.

        Returns:
            Scorers by the position of the sample.
        """
        places = {}
        for place, sample in enumerate(found.samples or []):
            if sample.error or sample.output is None or not sample.output.choices:
                continue
            scores = sample.scores or {}
            if stale := tuple(name for name in names if self._is_stale(name, scores.get(name))):
                places[place] = stale
        return places

    def _is_stale(self, name: str, given: Score | None) -> bool:
        if given is None or name == COUNTS:
            return given is None
        about = given.metadata or {}
        judge, kind = about.get("judge") or {}, name.removesuffix(CHAIN)
        if kind == "refusal":
            return bool(judge.get("revision") != self._refusal_revision)
        if not is_graded(name) or self._grader is None or about.get("status") == "empty":
            return False
        now = self._hash, prompt_sha256(kind)
        return about.get("status") == "failed" or (judge.get("grader"), judge.get("prompt_sha256")) != now

    def run(self, job: Job, path: Path, tell: Tell, display: str) -> int:
        """Judge what needs it, and write the log after every few answers.

        Returns:
            How many answers were judged.
        """
        task = make_task(job.spec)
        names = scorer_names(task)
        found = read_eval_log(str(path), resolve_attachments="full")
        name_graders(found)
        stale = self.stale(found, names)
        if not stale or found.samples is None:
            return 0
        tell(f"{job.name}: judging {len(stale)} answers again")
        scorers = dict(zip(names, task.scorer or [], strict=True))
        for wanted in dict.fromkeys(stale.values()):
            places = [place for place, those in stale.items() if those == wanted]
            for start in range(0, len(places), _JUDGED_TOGETHER):
                chosen = places[start : start + _JUDGED_TOGETHER]
                self._judge(found, chosen, wanted, scorers, display)
                replace_log(found, path)
        return len(stale)

    def _judge(
        self, found: EvalLog, places: Sequence[int], wanted: Sequence[str], scorers: Mapping[str, Scorer], display: str
    ) -> None:
        """Replace scores of some samples; an earlier score stays where its judge fails now."""
        samples = found.samples or []
        before = [dict(samples[place].scores or {}) for place in places]
        chosen = [samples[place] for place in places]
        asked = [name for name in wanted if name != COUNTS]
        if asked:
            bare = [
                _with_scores(s, {n: one for n, one in b.items() if n not in asked})
                for s, b in zip(chosen, before, strict=True)
            ]
            chosen = self._scored(found, bare, [scorers[name] for name in asked], display)
        merged = []
        for sample, earlier in zip(chosen, before, strict=True):
            scores = {**earlier, **{n: s for n, s in (sample.scores or {}).items() if not _is_lost(s, earlier.get(n))}}
            scores.pop(COUNTS, None)
            merged.append(
                _with_scores(sample, {n: scores[n] for n in dict.fromkeys((*scorers, *scores)) if n in scores})
            )
        if COUNTS in scorers:  # it reads the other scores
            merged = self._scored(found, merged, [scorers[COUNTS]], display)
        for place, sample in zip(places, merged, strict=True):
            samples[place] = sample

    def _scored(
        self, found: EvalLog, samples: list[EvalSample], scorers: Sequence[Scorer], display: str
    ) -> list[EvalSample]:
        """Samples with scores added; no grader is asked but the present one, whatever the log names."""
        head = found.eval.model_copy(update={"model_roles": None})
        judged = score(
            found.model_copy(update={"samples": samples, "eval": head}),
            list(scorers),
            model="none/none",
            model_roles={"grader": self._grader} if self._grader is not None else None,
            action="append",
            display=display,
        )
        if self._grader is not None:
            name_graders(judged, self._hash)
        return judged.samples or []


def _with_scores(sample: EvalSample, scores: dict[str, Score]) -> EvalSample:
    return sample.model_copy(update={"scores": scores})


def _is_lost(given: Score, earlier: Score | None) -> bool:
    """Whether a judge failed on what was judged before."""
    return (given.metadata or {}).get("status") == "failed" and (
        earlier is not None and (earlier.metadata or {}).get("status") != "failed"
    )
