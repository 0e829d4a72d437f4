"""Names, order and marker strings of the steps of a reasoning chain. Everything else builds on them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

QUESTION = "question"
"""Name of everything before the first step; its id is 0 and it has no expert of its own."""

IGNORE_INDEX = -100
"""Label of a token that is not predicted: torch's and transformers' convention."""

DEFAULT_STEPS = ("analysis", "guidance", "response")
CHECK = "check"
FORM_SEPARATOR = "+"

ADAPTIVE = "adaptive"
"""Mode of generation: the model chooses its steps."""

VERIFY = "verify"
"""Mode of generation: answer at once, and add reasoning steps while the answer is judged unsafe."""

_RESERVED = {
    QUESTION: "the tokens outside every step",
    "messages": "the column of the dialogue",
    "id": "the column of row ids",
    **dict.fromkeys(
        ("row", "mode", "run", "input", "steps", "token_counts", "finished", "truncated", "valid", "spent", "attempts"),
        "a column of generated chains",
    ),
    "error": "the column of questions that were refused",
}
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


def start_marker(step: str) -> str:
    """The string of the token that opens a step: ``<|analysis|>``."""
    return f"<|{step}|>"


def end_marker(step: str) -> str:
    """The string of the token that closes a step: ``<|/analysis|>``."""
    return f"<|/{step}|>"


def markers(steps: Sequence[str]) -> list[str]:
    """All marker strings, start before end, in the order of the steps: 2 * len(steps) strings."""
    return [marker(step) for step in steps for marker in (start_marker, end_marker)]


def answer_step(steps: Sequence[str]) -> str:
    """The step the user sees: the last one, or the one before a trailing ``check``."""
    return steps[-2] if steps[-1] == CHECK else steps[-1]


def reasoning_steps(steps: Sequence[str]) -> tuple[str, ...]:
    """The steps before the answer, in order."""
    return tuple(steps[: steps.index(answer_step(steps))])


def chain_form(present: Iterable[str]) -> str:
    """The name of a chain's form: its steps joined with "+", such as ``analysis+response``."""
    return FORM_SEPARATOR.join(present)


def parse_form(form: str) -> list[str]:
    """The steps of a form as a person types it: ``analysis+response`` or ``analysis,response``."""
    return [name.strip() for name in form.replace(",", FORM_SEPARATOR).split(FORM_SEPARATOR)]


def validate_steps(steps: Sequence[str]) -> tuple[str, ...]:
    """Check step names and return them as a tuple.

    Raises:
        ValueError: If a name is malformed, reserved or used twice, or if no answer step remains.
    """
    for step in steps:
        if not isinstance(step, str) or not _NAME.match(step):
            raise ValueError(
                f"mote.steps must hold lower-case names (letters, digits, underscore); got {step!r}. Rename the step."
            )
        if step in _RESERVED:
            raise ValueError(f"mote.steps must not hold {step!r}; it names {_RESERVED[step]}. Rename the step.")
    if len(set(steps)) != len(steps):
        raise ValueError(f"mote.steps must not repeat a name; got {list(steps)}. Remove the duplicate.")
    if CHECK in steps[:-1]:
        raise ValueError(f"mote.steps must hold 'check' only after the answer; got {list(steps)}. Move it to the end.")
    if not steps or list(steps) == [CHECK]:
        raise ValueError(f"mote.steps must hold at least the answer step; got {list(steps)}. Add 'response'.")
    return tuple(steps)
