"""What `adapter_config.json` holds: the PEFT configuration of type MOTE.

The one source of truth for a trained adapter: steps, marker strings and ids, ranks and weights are read only
here. No YAML, no tokenizer, no model.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Self, cast, get_type_hints

from peft import LoraConfig
from peft.utils import CONFIG_NAME, PeftType
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from axolotl_mote.chain.steps import DEFAULT_STEPS, markers, validate_steps
from axolotl_mote.chain.vocabulary import StepVocabulary

PEFT_TYPE = "MOTE"
QUESTION_ROUTINGS = ("random", "mean", "shared")

_LIMITS: dict[str, Any] = {"r": Field(ge=1), "lora_dropout": Field(ge=0, lt=1)}
_TYPES: dict[str, Any] = {
    "init_lora_weights": bool | str,
    "rank_pattern": dict[str, int],
    "alpha_pattern": dict[str, float],
    "trainable_token_indices": Annotated[list[int] | dict[str, list[int]], Field(min_length=1)] | None,
}
"""Fields that PEFT's annotation describes too widely, or too narrowly."""

_VARIANTS = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "velora_config",
)
"""Options of PEFT's LoRA that have no meaning with experts, or no test; not every version of PEFT has all of them."""


@functools.cache
def _schema(kind: type[LoraConfig]) -> type[BaseModel]:
    """The fields of a configuration with their annotated types; all may be absent."""
    types = get_type_hints(kind) | _TYPES
    members: dict[str, Any] = {
        one.name: (Annotated[types[one.name], _LIMITS.get(one.name, Field())], None) for one in fields(kind)
    }
    return create_model(kind.__name__, __config__=ConfigDict(strict=True), **members)


def check_values(kind: type[LoraConfig], values: Mapping[str, Any]) -> None:
    """Check values of an adapter's configuration against the types of its fields, as adapter_config.json holds them.

    PEFT takes whatever the file says, and fails or goes wrong later.

    Args:
        kind: The configuration's class.
        values: What is given; unknown keys are ignored. Sets and tuples count as lists.

    Raises:
        ValueError: If a value has another type, or a rank or dropout is out of range.
    """
    try:
        _schema(cast(Any, kind)).model_validate_json(json.dumps(values, default=_as_json))
    except ValidationError as error:
        rules: dict[str, set[str]] = {}
        for fault in error.errors():
            rules.setdefault(str(fault["loc"][0]), set()).add(fault["msg"].replace("Input should", "must"))
        # Sorted: a union's members come in the order in which typing saw that union first in this process.
        faults = [f"{key} {' or '.join(sorted(said))}; got {values[key]!r:.100}" for key, said in rules.items()]
        raise ValueError(f"{'; '.join(faults)}. Use the value that training wrote.") from error


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, set | frozenset) else str(value)


@dataclass
class MoteConfig(LoraConfig):
    """Configuration of a step-routed LoRA adapter (MoTE, section 3.2).

    Args:
        r: Rank of ONE expert. The LoRA of a layer has rank ``total_rank = (len(steps) + 1) * r``.
        lora_alpha: PEFT meaning: the scaling is ``lora_alpha / r``.
        steps: Names of the steps in the order of the chain; rank block k belongs to the k-th, the last block is shared.
        markers: Marker strings, start before end, in the order of the steps; filled in when empty.
        marker_ids: Token ids of ``markers``; empty until a tokenizer has been seen.
        expert_weight: Weight of the step's expert; the shared expert gets ``1 - expert_weight`` (the paper's alpha).
        question_routing: Which experts question tokens are routed to: ``random`` (one step expert per document while
            training, their mean otherwise), ``mean`` (always the mean) or ``shared`` (only the shared expert).
        base_sample: A few weights of the base model, from ``origin.sample_weights``; empty: the base is not checked.

    Raises:
        ValueError: If a value breaks its rule, or for a LoRA variant that cannot be routed.
    """

    steps: list[str] = field(default_factory=lambda: list(DEFAULT_STEPS))
    markers: list[str] = field(default_factory=list)
    marker_ids: list[int] = field(default_factory=list)
    expert_weight: float = 0.5
    question_routing: str = "random"
    base_sample: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_values(type(self), self.to_dict())
        self._refuse_variants()
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        self.task_type: str = getattr(self, "task_type", None) or "CAUSAL_LM"  # without one PEFT bypasses our forward
        self.steps = list(validate_steps(self.steps))
        self.markers = list(self.markers) or markers(self.steps)
        if len(self.markers) != 2 * len(self.steps):
            raise ValueError(
                f"markers must hold a start and an end for each of the steps {self.steps}; got {self.markers}. "
                "Use the adapter_config.json that training wrote."
            )
        count = 2 * len(self.steps)
        if self.marker_ids and not (len(self.marker_ids) == len({i for i in self.marker_ids if i >= 0}) == count):
            raise ValueError(
                f"marker_ids must hold {count} different ids for {self.markers}; got {self.marker_ids}. "
                "Use the adapter_config.json that training wrote."
            )
        if not 0.0 <= self.expert_weight <= 1.0:
            raise ValueError(f"expert_weight must be in [0, 1]; got {self.expert_weight}. The paper uses 0.5.")
        if self.question_routing not in QUESTION_ROUTINGS:
            raise ValueError(
                f"question_routing must be one of {QUESTION_ROUTINGS}; got {self.question_routing!r}. "
                "Use 'random' for the paper's setting."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> Self:
        """Read adapter_config.json.

        Raises:
            ValueError: If a value in it is wrong; the message begins with the file.
        """
        try:
            config: Self = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except ValueError as error:
            place = Path(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
            raise ValueError(f"{place}: {error}") from error
        return config

    def _refuse_variants(self) -> None:
        refused = {name: bool(getattr(self, name, None)) for name in _VARIANTS}
        refused |= {
            "bias": self.bias != "none",
            "init_lora_weights": self.init_lora_weights not in (True, False, "gaussian"),
        }
        for name, used in refused.items():
            if used:
                raise ValueError(
                    f"{name} must stay at its default with peft_type MOTE; got {getattr(self, name)!r}. "
                    "Remove it, or train a plain LoRA adapter with it."
                )

    @property
    def num_steps(self) -> int:
        """Number of steps S; step ids run from 1 to S, 0 is the question."""
        return len(self.steps)

    @property
    def total_rank(self) -> int:
        """Rank R = (S + 1) * r of the one LoRA that holds every expert."""
        return int((self.num_steps + 1) * self.r)

    @property
    def scaling(self) -> float:
        """Factor on every expert's output: lora_alpha / r."""
        return float(self.lora_alpha / self.r)

    @property
    def vocabulary(self) -> StepVocabulary:
        """The steps and their marker ids."""
        return StepVocabulary.from_marker_ids(self.steps, self.marker_ids)
