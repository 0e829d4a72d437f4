"""What `adapter_config.json` holds: the PEFT configuration of type MOTE.

The one source of truth for a trained adapter: steps, marker strings and ids, ranks and weights are read only
here. No YAML, no tokenizer, no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.utils import PeftType

from axolotl_mote.chain.steps import DEFAULT_STEPS, markers, validate_steps
from axolotl_mote.chain.vocabulary import StepVocabulary

PEFT_TYPE = "MOTE"
QUESTION_ROUTINGS = ("random", "mean", "shared")


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

    Raises:
        ValueError: If a value breaks its rule, or for a LoRA variant that cannot be routed.
    """

    steps: list[str] = field(default_factory=lambda: list(DEFAULT_STEPS))
    markers: list[str] = field(default_factory=list)
    marker_ids: list[int] = field(default_factory=list)
    expert_weight: float = 0.5
    question_routing: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        self.task_type: str = getattr(self, "task_type", None) or "CAUSAL_LM"  # without one PEFT bypasses our forward
        self.steps = list(validate_steps(self.steps))
        self.markers = list(self.markers) or markers(self.steps)
        if len(self.markers) != 2 * len(self.steps):
            raise ValueError(
                f"markers must hold a start and an end for each of {self.steps}; got {self.markers}. "
                "Use the adapter_config.json that training wrote."
            )
        if self.marker_ids and (len(set(self.marker_ids)) != 2 * len(self.steps)):
            raise ValueError(
                f"marker_ids must hold {2 * len(self.steps)} different ids for {self.markers}; got {self.marker_ids}. "
                "Use the adapter_config.json that training wrote."
            )
        if not 0.0 <= self.expert_weight <= 1.0:
            raise ValueError(f"expert_weight must be in [0, 1]; got {self.expert_weight}. The paper uses 0.5.")
        if self.question_routing not in QUESTION_ROUTINGS:
            raise ValueError(
                f"question_routing must be one of {QUESTION_ROUTINGS}; got {self.question_routing!r}. "
                "Use 'random' for the paper's setting."
            )
        self._refuse_variants()

    def _refuse_variants(self) -> None:
        refused: dict[str, Any] = {
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
            "lora_bias": self.lora_bias,
            "bias": self.bias != "none",
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "layer_replication": self.layer_replication,
            "target_parameters": self.target_parameters,
            "modules_to_save": self.modules_to_save,
            "trainable_token_indices": self.trainable_token_indices,
            "fan_in_fan_out": self.fan_in_fan_out,
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
