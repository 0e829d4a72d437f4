"""The algebra of the export: which rank blocks make up a step, and how they are weighted.

A token of step k gets ``W x + B ((A x) * g_k)`` with a constant gate row g_k. Remove the ranks where g_k is zero and
fold the others into B: the result is a plain LoRA of scaling 1 that computes the same function. Pure tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_mote.chain.steps import QUESTION
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.routing import gate_table

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM accepts for --max-lora-rank."""

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class AdapterPlan:
    """What one exported adapter consists of.

    Args:
        name: Name of the step, or "question".
        step: Step id, 0 for the question.
        weights: Weight of each rank block, scaling included; the last block is the shared expert. Zero: not exported.
        r: Rank of one block.
    """

    name: str
    step: int
    weights: tuple[float, ...]
    r: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the exported blocks."""
        return tuple(k for k, weight in enumerate(self.weights) if weight != 0.0)

    @property
    def rank(self) -> int:
        """Rank before padding; 0: the step is the base model alone, without an adapter."""
        return len(self.blocks) * self.r

    @property
    def served_rank(self) -> int:
        """The next larger rank that servers accept; the added ranks are zeros.

        Raises:
            ValueError: If no server accepts so large a rank.
        """
        if self.rank == 0:
            return 0
        for rank in SERVED_RANKS:
            if rank >= self.rank:
                return rank
        raise ValueError(
            f"an exported adapter must have a rank of at most {SERVED_RANKS[-1]}; {self.name} needs {self.rank}. "
            "Merge the shared expert into the base model, or train with a smaller lora_r."
        )


def block_weights(config: MoteConfig) -> Tensor:
    """Weight of each block for each step outside training, scaling included: (S + 1, S + 1); row 0 is the question."""
    return gate_table(config)[:, :: config.r]


def plan_adapters(config: MoteConfig, merge_shared: bool = False) -> list[AdapterPlan]:
    """One plan for the question and one per step.

    For two steps, r = 8, weight 0.5 and scaling 2 the plans have the weights (.5, .5, 1), (1, 0, 1) and (0, 1, 1),
    hence the ranks 24, 16 and 16. With the shared expert merged into the base model the last column is zero.
    """
    weights = block_weights(config)
    if merge_shared:
        weights = weights.clone()
        weights[:, -1] -= shared_weight(config)
    names = (QUESTION, *config.steps)
    return [AdapterPlan(name, k, tuple(weights[k].tolist()), config.r) for k, name in enumerate(names)]


def shared_weight(config: MoteConfig) -> float:
    """Weight of the shared expert, the same for every token; scaling included."""
    return float(block_weights(config)[0, -1])


def build_adapter(tensors: Mapping[str, Tensor], plan: AdapterPlan) -> dict[str, Tensor]:
    """The tensors of one plain LoRA adapter, with PEFT's names, for lora_alpha = r = ``plan.served_rank``.

    Args:
        tensors: The tensors of the MoTE adapter.
        plan: Which blocks to take.

    Returns:
        ``lora_A.weight`` (rank, D_in) and ``lora_B.weight`` (D_out, rank) for every target module.
    """
    adapter: dict[str, Tensor] = {}
    for module, a, b in target_weights(tensors):
        new_a = a.new_zeros(plan.served_rank, a.shape[1])
        new_b = b.new_zeros(b.shape[0], plan.served_rank)
        for place, block in enumerate(plan.blocks):
            to, of = _ranks(place, plan.r), _ranks(block, plan.r)
            new_a[to] = a[of]
            new_b[:, to] = (b[:, of].float() * plan.weights[block]).to(b.dtype)
        adapter[module + LORA_A], adapter[module + LORA_B] = new_a, new_b
    return adapter


def shared_updates(tensors: Mapping[str, Tensor], config: MoteConfig) -> Iterator[tuple[str, Tensor]]:
    """(module, weight update (D_out, D_in) in float32) of the shared expert for every target module."""
    weight, last = shared_weight(config), _ranks(config.num_steps, config.r)
    for module, a, b in target_weights(tensors):
        yield module, weight * (b[:, last].float() @ a[last].float())


def target_weights(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, A, B) of every target module of a MoTE adapter.

    Raises:
        ValueError: If an A has no B.
    """
    for key in sorted(tensors):
        if key.endswith(LORA_A):
            module = key.removesuffix(LORA_A)
            if module + LORA_B not in tensors:
                raise ValueError(
                    f"adapter must hold a B for every A; got no {module + LORA_B}. Export a complete adapter folder."
                )
            yield module, tensors[key], tensors[module + LORA_B]


def marker_rows(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Marker rows of the embedding and of the head, both (2S, D); the same ones where the two are tied.

    Raises:
        ValueError: If the adapter holds no marker rows.
    """
    rows = {key: value for key, value in tensors.items() if key.endswith("lora_marker_rows.weight")}
    head = [value for key, value in rows.items() if "embed" not in key]
    table = [value for key, value in rows.items() if "embed" in key]
    if len(table) != 1 or len(head) > 1:
        raise ValueError(
            f"adapter must hold marker rows for the embedding and at most one head; got {sorted(rows)}. "
            "Export an adapter folder that training wrote."
        )
    return table[0], head[0] if head else table[0]


def _ranks(block: int, r: int) -> slice:
    return slice(block * r, (block + 1) * r)


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference where both are finite; ids without a row have minus infinity in the MoTE model."""
    width = min(a.shape[-1], b.shape[-1])
    a, b = a[..., :width].float(), b[..., :width].float()
    both = torch.isfinite(a) & torch.isfinite(b)
    return float(torch.where(both, a - b, 0.0).abs().max()) if both.any() else 0.0
