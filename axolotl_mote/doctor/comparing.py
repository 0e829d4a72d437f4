"""Two results of one computation, against a limit and against what a fault would make.

A comparison that cannot fail proves nothing. So each has a third result, computed with the fault that it looks for,
such as a wrong route: the yardstick. Pure tensors; no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_mote.doctor.lines import FAILED, NOT_TESTED, OK, Finding

LIMIT = 1e-4
"""Largest difference in float32, as a share of what is compared; rounding stays near 1e-6."""
ROUNDING = 1e-6
PART = 0.1
"""Largest difference as a share of the yardstick, in any precision."""


@dataclass(frozen=True)
class Comparison:
    """How far two results are apart; both as a share of the size of what is expected.

    Args:
        difference: Of what was found.
        yardstick: Of what a fault would give.
        exact: Whether both ran in float32.
    """

    difference: float
    yardstick: float
    exact: bool

    @property
    def limit(self) -> float:
        """The largest difference that is allowed."""
        return min(LIMIT, PART * self.yardstick) if self.exact else PART * self.yardstick

    @property
    def blind(self) -> bool:
        """Whether a fault would be no larger than rounding."""
        return not self.yardstick * PART > ROUNDING

    def figures(self) -> dict[str, float]:
        """For a finding."""
        return {"difference": self.difference, "limit": self.limit, "yardstick": self.yardstick}


def compare(found: Tensor, expected: Tensor, wrong: Tensor, exact: bool) -> Comparison:
    """Compare token by token: the worst token counts.

    Args:
        found: What was found, shape (..., T, D), or (T,) for one number per token.
        expected: The same computed in another way.
        wrong: The same with a fault.
        exact: Whether both ran in float32.
    """
    found, expected, wrong = (x.detach().float() for x in (found, expected, wrong))
    size = float(_rms(expected, all_tokens=True)) or 1.0
    return Comparison(_worst(found, expected, size), _worst(wrong, expected, size), exact)


def compare_named(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], wrong: Mapping[str, Tensor], exact: bool
) -> Comparison:
    """Compare tensors by name, such as gradients, by the size of all their differences together."""
    size = _norm(expected, {}) or 1.0
    return Comparison(_norm(found, expected) / size, _norm(wrong, expected) / size, exact)


def judge(comparison: Comparison, good: str, bad: str, fault: str, key: str) -> Finding:
    """The finding of a comparison.

    Args:
        comparison: The comparison.
        good: What holds if it is within its limit.
        bad: What is wrong otherwise.
        fault: What the yardstick is made with.
        key: Key of the YAML file to change.
    """
    said = f"difference {comparison.difference:.1e}, {comparison.limit:.1e} allowed; {fault} makes "
    said += f"{comparison.yardstick:.1e}"
    if not math.isfinite(comparison.difference):
        return Finding(FAILED, f"{bad}: the result is not finite", key)
    if comparison.blind:
        return Finding(NOT_TESTED, f"{fault} would not show here ({comparison.yardstick:.1e})")
    if comparison.difference > comparison.limit:
        return Finding(FAILED, f"{bad}: {said}", key, comparison.figures())
    return Finding(OK, f"{good}: {said}", figures=comparison.figures())


def _rms(x: Tensor, all_tokens: bool = False) -> Tensor:
    squares = x.square()
    return squares.mean().sqrt() if all_tokens or x.dim() < 2 else squares.mean(-1).sqrt()


def _worst(one: Tensor, other: Tensor, size: float) -> float:
    same = one == other  # logits may be minus infinity in the same places
    gap = torch.where(same, torch.zeros_like(one), one - other)
    per_token = gap.abs() if gap.dim() < 2 else _rms(gap)
    worst = float(per_token.max()) / size
    return worst if math.isfinite(worst) else math.inf


def _norm(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    total = 0.0
    for name, tensor in tensors.items():
        gap = tensor.detach().double()
        total += float((gap - others[name].detach().double() if others else gap).square().sum())
    return math.sqrt(total)
