"""The answers that a cell lacks, generated and scored by inspect_ai.

A cell that was killed goes on from the log that holds the most answers. It knows nothing of answers that are there but
lack a score.
"""

from __future__ import annotations

from typing import Any

from inspect_ai import eval as inspect_eval
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import Model

from axolotl_mote.evaluation.compat import resumed
from axolotl_mote.evaluation.running.cells import Job, make_task
from axolotl_mote.evaluation.running.endpoints import closing, grader_hash, model_of
from axolotl_mote.evaluation.settings import Settings, identity_hash

_FAILED_SHARE = 0.1
"""Share of failed requests after which a server counts as dead; its other prompts wait for the next run."""


class Interrupted(Exception):
    """Ctrl-C while a cell was answered; what was finished is in its log."""


def answer(settings: Settings, job: Job, grader: Model | None, display: str) -> EvalLog:
    """Answer what a cell lacks; finished answers are taken over.

    Args:
        settings: The evaluation.
        job: The cell.
        grader: The model of the LLM judges.
        display: How inspect_ai shows progress.

    Raises:
        Interrupted: On Ctrl-C.
    """
    task = make_task(job.spec)
    best = job.best_log()
    work: Any = task
    if best is not None:
        work = resumed(task, read_eval_log(str(best), resolve_attachments="full"))
    job.folder.mkdir(parents=True, exist_ok=True)
    about = {"cell": identity_hash(job.identity), "grader": grader_hash(settings)}
    model = model_of(settings, job.system, job.mode)
    with closing(job.system, model):
        logs = inspect_eval(
            work,
            model=model,
            model_roles={"grader": grader} if grader is not None else None,
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
