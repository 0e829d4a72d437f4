"""Every private name of inspect_ai that evaluation uses.

Each entry names what it works around and where that stands upstream. A name that is gone is an error when this module
is imported. Tested with inspect-ai 0.3.285; ``axolotl_mote.versions`` has the range.
"""

from __future__ import annotations

from typing import Any

from inspect_ai import Task
from inspect_ai.log import EvalLog

from axolotl_mote.versions import private_names

with private_names():
    from inspect_ai._eval.task.task import PreviousTask

    # The sample that a request to a model belongs to, and so its epoch; there is no public name for it.
    # Upstream: inspect_ai/solver/_task_state.py.
    from inspect_ai.solver._task_state import sample_state

__all__ = ["resumed", "sample_state"]


def resumed(task: Task, earlier: EvalLog) -> Any:
    """A task for ``inspect_ai.eval`` that takes the finished samples of a log over and answers the others.

    Works around: the public ``eval_retry`` makes model, roles and judges anew from their names in the log, and the log
    has no names for those that were made here.
    Upstream: inspect_ai/_eval/task/task.py, ``PreviousTask``; inspect_ai/_eval/eval.py, ``eval_retry``.

    Args:
        task: The task of the log, made again.
        earlier: The log.
    """
    return PreviousTask(
        id=earlier.eval.task_id,
        task=task,
        task_args=earlier.eval.task_args,
        model=None,
        model_roles=None,
        sandbox=None,
        log=earlier,
        log_info=None,
    )
