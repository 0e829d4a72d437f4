"""Names of the lines, verdicts and findings. No torch, so that the command's help stays quick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

OK, FAILED, NOT_APPLICABLE, NOT_TESTED = "ok", "failed", "not applicable", "not tested"

LINES: dict[str, str] = {
    "versions": "installed packages are among the tested ones",
    "config": "axolotl and the plugin accept the configuration",
    "family": "the support matrix knows the model's family",
    "data": "chains fit into sequence_len, and every step keeps some",
    "markers": "markers survive the tokenizer and the chat template",
    "model": "the base model loads and passes the self-check",
    "routing": "every layer uses the expert of each token's step",
    "gradients": "the experts of a chain's steps get gradients, others exactly none",
    "step-dropout": "no later token sees a dropped step",
    "checkpointing": "gradient checkpointing leaves gradients as they are",
    "packing": "packed chains have the losses of single ones",
    "generation": "with a cache, generation switches experts as one forward does",
    "disabled": "without the adapter the model is the base model",
    "saving": "the saved adapter is complete and loads as it was",
    "compile": "compiled layers give the gradients of uncompiled ones",
    "training": "every expert moves in a few steps as configured",
    "resume": "a resumed run ends where one without a break ends",
    "processes": "several processes train what one does",
    "sharding": "DeepSpeed or FSDP2 saves the whole adapter",
    "estimate": "memory and speed of a training process",
}
"""What each line proves, in the order in which they run."""


@dataclass
class Finding:
    """The verdict of one line.

    Args:
        verdict: OK, FAILED, NOT_APPLICABLE or NOT_TESTED.
        text: What was found, or why nothing was.
        key: The key of the YAML file to change, if the line failed.
        figures: What was measured, by name.
        line: Name of the line.
        seconds: How long it took.
    """

    verdict: str
    text: str
    key: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    line: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class NotTestedError(Exception):
    """A line cannot be tested here; the message says why."""


def choose(only: Sequence[str], skip: Sequence[str]) -> list[str]:
    """The lines to run, in their order; all of them unless ``only`` names some."""
    return [name for name in LINES if name not in skip and (not only or name in only)]
