"""Templates to chat messages, for each stage.

A template file is named after its stage (``analysis.jinja``) and has two Jinja2 blocks, ``system`` and ``user``; an
empty system block sends no system message. Templates run in a sandbox. Questions and generated texts reach them only as
values, so Jinja2 syntax in them is never evaluated. Control tokens in values are broken up. The values:

    messages     list of {role, content}, the whole dialogue
    last         content of its last user turn
    analysis, guidance, response    text of a step, or None
    max_words    number of words that surely fits into the stage's max_new_tokens
    constrained  whether a check can write nothing but its verdict

The filter ``quote`` puts ``> `` before every line; no content can escape from it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from axolotl_mote.builder.settings import Stage
from axolotl_mote.builder.texts.similarity import normalize
from axolotl_mote.chain.questions import Messages
from axolotl_mote.chain.quoting import neutralize, quote

_TAGS = re.compile(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", re.DOTALL)
_BUILT_IN = Path(__file__).parent / "templates"


class Prompts:
    """The templates of a build.

    Args:
        stages: Stages whose templates are loaded, by name.
        folder: Folder with templates that replace the built-in ones of the same name.
        control_tokens: More control tokens to break up in values; see ``chain.quoting.neutralize``.

    Raises:
        ValueError: If a template cannot be read or compiled, or lacks the block ``user``.
    """

    def __init__(
        self, stages: dict[str, Stage], folder: Path | None = None, control_tokens: Sequence[str] = ()
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
        )
        environment.filters["quote"] = quote
        self._templates, self._stages, self._control_tokens = {}, stages, tuple(control_tokens)
        self.hashes: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self._windows: set[tuple[str, ...]] = set()
        if folder is not None and not folder.is_dir():
            raise ValueError(f"prompts must be a folder with templates; got {folder}. Create it or leave the key out.")
        for stage in stages:
            file = _template_file(stage, folder)
            try:
                source = file.read_text(encoding="utf-8")
                template = environment.from_string(source)
            except (OSError, UnicodeDecodeError, TemplateError) as error:
                raise ValueError(f"{file} must be a Jinja2 template; got: {error}. Correct it.") from error
            if "user" not in template.blocks:
                raise ValueError(f"{file} must have a block named user; got {sorted(template.blocks)}. Add it.")
            self._templates[stage] = template
            self._windows |= set(_windows(_TAGS.sub(" ", source)))
            self.hashes[stage] = hashlib.sha256(source.encode()).hexdigest()[:16]
            self.files[stage] = file.name if folder is None or file.parent != folder else str(file)

    def render(self, stage: str, messages: Messages, **texts: str | None) -> Messages:
        """Chat messages for a stage.

        Args:
            stage: Which template.
            messages: The dialogue, ending in a user turn.
            **texts: analysis, guidance and response, as far as they exist.

        Returns:
            For ``response`` the dialogue with its last turn rendered, so that the model sees real turns; for the other
            stages one user message. A system block that is not empty comes first.
        """
        safe = _harmless(messages, self._control_tokens)
        values: dict[str, Any] = dict.fromkeys(("analysis", "guidance", "response"))
        values.update(
            {name: neutralize(text, self._control_tokens)[0] if text else text for name, text in texts.items()}
        )
        values.update(messages=safe, last=safe[-1]["content"])
        values["max_words"] = max(10, self._stages[stage].max_new_tokens // 20 * 10)
        values["constrained"] = getattr(self._stages[stage], "constrained", False)
        system, user = self._block(stage, "system", values), self._block(stage, "user", values)
        turns = (
            [*safe[:-1], {"role": "user", "content": user}]
            if stage == "response"
            else [{"role": "user", "content": user}]
        )
        if not system:
            return turns
        if turns[0]["role"] == "system":
            return [{"role": "system", "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]]
        return [{"role": "system", "content": system}, *turns]

    def leaks(self, text: str) -> bool:
        """True if a generated text repeats eight consecutive words of a template, as weak models do."""
        return any(window in self._windows for window in _windows(text))

    def _block(self, stage: str, name: str, values: dict[str, Any]) -> str:
        template = self._templates[stage]
        if name not in template.blocks:
            return ""
        try:
            return "".join(template.blocks[name](template.new_context(values))).strip()
        except TemplateError as error:
            raise ValueError(
                f"block {name} of template {stage} must render; got: {error}. Correct the template."
            ) from error


def _windows(text: str) -> list[tuple[str, ...]]:
    words = normalize(text).split()
    return [tuple(words[i : i + 8]) for i in range(len(words) - 7)]


def guard_messages(messages: Messages, response: str, control_tokens: Sequence[str] = ()) -> Messages:
    """The dialogue and its answer as plain turns, for a guard model whose chat template holds the instructions."""
    return _harmless([*messages, {"role": "assistant", "content": response}], control_tokens)


def _harmless(messages: Messages, control_tokens: Sequence[str]) -> Messages:
    return [{"role": turn["role"], "content": neutralize(turn["content"], control_tokens)[0]} for turn in messages]


def _template_file(stage: str, folder: Path | None) -> Path:
    own = folder / f"{stage}.jinja" if folder is not None else None
    return own if own is not None and own.exists() else _BUILT_IN / f"{stage}.jinja"
