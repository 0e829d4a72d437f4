"""Prompts of LLM judges: a dialogue and an answer to one user message.

Foreign text cannot leave its place: every line of it is quoted with ``> ``, whatever line break it uses, its control
tokens are broken up, and Jinja2 syntax in it is never evaluated. Only the answer is shown, not the reasoning before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from axolotl_mote.chain.quoting import encodable, neutralize, quote
from axolotl_mote.evaluation.judges.verdicts import PARSERS

_TEMPLATES = Path(__file__).parent / "templates"
_FRAME = "judge.jinja"
# A judge that repeats one of these would hide its own verdict: what such marks enclose is not read.
_THINKING = ("<think>", "</think>", "<thinking>", "</thinking>", "◁think▷", "◁/think▷")


def judge_prompt(kind: str, messages: Sequence[Mapping[str, str]], answer: str) -> str:
    """What a judge is asked.

    Args:
        kind: harm, help, harm_help or strongreject.
        messages: The dialogue, ending in a user turn.
        answer: The answer alone.

    Raises:
        ValueError: If there is no such judge.
    """
    turns = [{"role": turn["role"], "content": _harmless(turn["content"])} for turn in messages]
    template = _environment().get_template(_file(kind))
    return template.render(messages=turns, answer=_harmless(answer)).strip()


@lru_cache(maxsize=16)
def prompt_sha256(kind: str) -> str:
    """SHA-256 of a judge's prompt template: verdicts compare between runs that agree in it.

    Raises:
        ValueError: If there is no such judge.
    """
    return hashlib.sha256(b"\0".join((_TEMPLATES / name).read_bytes() for name in (_FRAME, _file(kind)))).hexdigest()


def _file(kind: str) -> str:
    if kind not in PARSERS:
        raise ValueError(f"judge must be {', '.join(PARSERS)}; got {kind!r}. Correct the name.")
    return f"{kind}.jinja"


def _harmless(text: str) -> str:
    return neutralize(encodable(text), _THINKING)[0]


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quote"] = quote
    return environment
