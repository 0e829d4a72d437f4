"""Chat templates: variables that are fixed in one, and blocks that its generation prompt leaves open.

A template is saved with the tokenizer. What is fixed in it therefore renders alike in training, in ``load_mote``, in an
exported model and in any server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GIVEN = ("messages", "add_generation_prompt", "continue_final_message")
"""What the caller of a template gives."""

_RESERVED = (
    "not",
    "and",
    "or",
    "in",
    "is",
    "if",
    "else",
    "true",
    "false",
    "none",
    "loop",
    "namespace",
    "raise_exception",
)
"""What Jinja and the tokenizer give."""

_TAG = re.compile(r"[<\[](/?)([A-Za-z][\w:]*)[>\]]")  # <think>, </think>, [THINK]; no control tokens such as <|user|>
_CONDITION = re.compile(r"\b(?:if|elif|and|or|not)\s+\(?([A-Za-z_]\w*)\b(?!\s*[.(\[])")
_PROBE = "\ue000"


def fix_variables(template: str, values: Mapping[str, Any]) -> str:
    """The template with variables set to values, whatever the caller passes for them.

    Example:
        >>> fix_variables("{{ x }}", {"x": False})
        '{% set x = false %}{{ x }}'

    Args:
        template: A chat template in Jinja.
        values: Value of each variable: null, a boolean, a number, a string, or lists and maps of these.

    Returns:
        The template; the one given if the values are fixed in it already.

    Raises:
        ValueError: If the template does not read a variable, or its caller always gives it.
    """
    for name in values:
        known_name = isinstance(name, str) and name.isidentifier() and name not in (*_GIVEN, *_RESERVED)
        if not known_name or not re.search(rf"\b{name}\b", template):
            known = ", ".join(_conditions(template)) or "none"
            raise ValueError(
                f"chat_template_kwargs must name variables of the chat template, such as {known}; got {name!r}. "
                "Rename or remove it."
            )
    fixed = "".join(f"{{% set {name} = {_literal(value)} %}}" for name, value in values.items())
    if template.startswith(fixed):
        return template
    # Chat templates drop a newline after a block, so the first of the template would go, and blanks before a block that
    # begins a line, so those of the template would stay.
    return fixed + ("\n" if template[:1].isspace() else "") + template


def _literal(value: Any) -> str:
    """A value as Jinja spells it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "chat_template_kwargs must hold null, booleans, finite numbers, strings, lists and maps of these; got "
            f"{value!r} of type {type(value).__name__}. Quote it."
        ) from error


def _conditions(template: str) -> list[str]:
    """Variables that conditions of a template test, in alphabetical order."""
    return sorted(set(_CONDITION.findall(template)) - {*_GIVEN, "not", "loop", "true", "false", "none"})


def open_block(tokenizer: PreTrainedTokenizerBase, **variables: Any) -> str | None:
    """The tag that the generation prompt opens and does not close, such as ``<think>``; None if there is none.

    Args:
        tokenizer: A tokenizer with a chat template.
        variables: Given to the template.

    Raises:
        TemplateError: If the template refuses a question, an answered one, or the variables.
    """
    asked = [{"role": "user", "content": _PROBE}]
    prompt: str = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **variables)
    answered = [*asked, {"role": "assistant", "content": "."}]
    turns: str = tokenizer.apply_chat_template(answered, tokenize=False, **variables)
    # Some templates spell the limits of turns like tags; these stay open after an answer too.
    limits = _open_tags(turns.rpartition(_PROBE)[2])
    return next((tag for tag in _open_tags(prompt.rpartition(_PROBE)[2]) if tag not in limits), None)


def _open_tags(text: str) -> list[str]:
    opened: dict[str, str] = {}
    for tag in _TAG.finditer(text):
        if tag[1]:
            opened.pop(tag[2], None)
        else:
            opened[tag[2]] = tag[0]
    return list(opened.values())


def way_to_close(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool] | None:
    """The variable, with its value, under which the generation prompt leaves no block open; None if there is none."""
    for name in _conditions(str(tokenizer.get_chat_template())):
        for value in (False, True):
            try:
                if open_block(tokenizer, **{name: value}) is None:
                    return {name: value}
            except (TemplateError, TypeError):  # the template wants another type
                continue
    return None
