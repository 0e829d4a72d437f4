"""Which token ids are markers, and which may stand inside a step.

The ids come from the adapter (adapter_config.json is the one source of truth). For a model without a MoTE adapter, such
as a plain LoRA baseline or an exported base with its step adapters, they are read from the tokenizer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from axolotl_mote.steps import CHECK, answer_step, end_marker, start_marker, validate_steps

_START = re.compile(r"<\|([a-z][a-z0-9_]*)\|>\Z")


@dataclass(frozen=True)
class StepVocabulary:
    """The steps of a model and the ids of their markers.

    Args:
        steps: Step names in order; step ids are 1-based positions in it.
        start_ids: Id of each step's start marker.
        end_ids: Id of each step's end marker.
    """

    steps: tuple[str, ...]
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]

    @property
    def answer(self) -> str:
        """Name of the step the user sees."""
        return answer_step(self.steps)

    @property
    def has_check(self) -> bool:
        """Whether the model was trained to judge its own answer."""
        return self.steps[-1] == CHECK

    @property
    def reasoning(self) -> tuple[str, ...]:
        """The steps before the answer, in order."""
        return self.steps[: self.steps.index(self.answer)]

    def step_id(self, name: str) -> int:
        """The 1-based id of a step.

        Raises:
            ValueError: If the model has no such step.
        """
        if name not in self.steps:
            raise ValueError(
                f"steps must name steps of this adapter, {list(self.steps)}; got {name!r}. Correct the name."
            )
        return self.steps.index(name) + 1

    def kinds(self) -> dict[int, int]:
        """Marker id -> +k for the start of step k, -k for its end."""
        starts = {token: k for k, token in enumerate(self.start_ids, 1)}
        ends = {token: -k for k, token in enumerate(self.end_ids, 1)}
        return starts | ends


def step_vocabulary(model: Any, tokenizer: Any) -> StepVocabulary:
    """The step vocabulary of a model: from its MoTE adapter, else from the tokenizer's added tokens.

    Raises:
        ValueError: If neither knows a step.
    """
    config = adapter_config(model)
    if config is not None and getattr(config, "marker_ids", None):
        return StepVocabulary(tuple(config.steps), tuple(config.start_ids), tuple(config.end_ids))
    return _from_tokenizer(tokenizer)


def adapter_config(model: Any) -> Any:
    """The active PEFT config of a model, or None for a model without an adapter."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    active = getattr(model, "active_adapter", None)
    name = active[0] if isinstance(active, list) else active
    return configs.get(name) or next(iter(configs.values()))


def _from_tokenizer(tokenizer: Any) -> StepVocabulary:
    """Read the steps from marker pairs among the added tokens, in the order of their ids."""
    added = {text: token for token, text in sorted((i, str(t)) for i, t in tokenizer.added_tokens_decoder.items())}
    names = [m.group(1) for text in added if (m := _START.match(text)) and end_marker(m.group(1)) in added]
    if not names:
        raise ValueError(
            "model must carry a MoTE adapter, or the tokenizer must hold step markers such as <|response|>; found "
            "neither. Load the adapter with load_mote, or use the tokenizer saved with it."
        )
    steps = validate_steps(names)
    return StepVocabulary(
        steps, tuple(added[start_marker(s)] for s in steps), tuple(added[end_marker(s)] for s in steps)
    )


def special_ids(tokenizer: Any, vocabulary: StepVocabulary) -> frozenset[int]:
    """Every id that may not stand inside a step: markers, end-of-turn, padding and all other special tokens."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if getattr(content, "special", False)}
    return frozenset(added) | frozenset(tokenizer.all_special_ids) | frozenset(vocabulary.kinds())
