"""The exported parts against the step-routed model: equal when switched per token; how far off otherwise.

Exact: the adapter of its step processes every token, and the KV cache is kept when the adapter changes. Not exact: a
server with one adapter per request that recomputes the earlier steps under the last step's adapter ("re-prefilling").
Their keys and values then differ from those in training; `Drift` measures the effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from axolotl_mote.chain.steps import QUESTION
from axolotl_mote.export.weights import largest_difference
from axolotl_mote.generation.decoding import evaluating
from axolotl_mote.model.compat import named_cache
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.routing import step_ids_from_tokens


@dataclass(frozen=True)
class Probe:
    """A question with its chain, and the step-routed model's logits on it.

    Args:
        ids: Tokens, (T,).
        step_ids: Their steps, (T,).
        logits: Logits of the step-routed model, (T, V), float32, on the CPU.
    """

    ids: Tensor
    step_ids: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Drift:
    """How a step's logits change when everything before it is re-prefilled under the step's adapter.

    Args:
        largest: Largest absolute difference of a logit.
        mean_kl: Mean KL divergence from the step-routed model, in nats per token.
        same_top: Share of tokens with the same likeliest successor.
        tokens: Tokens compared.
    """

    largest: float
    mean_kl: float
    same_top: float
    tokens: int


@torch.no_grad()
def make_probes(model: Any, config: MoteConfig, sequences: Sequence[Sequence[int]]) -> list[Probe]:
    """Record the step-routed model's logits on whole sequences."""
    probes = []
    with evaluating(model):
        for ids in sequences:
            row = torch.tensor([list(ids)], device=model.device)
            logits = model(input_ids=row).logits[0].float().cpu()
            probes.append(Probe(row[0].cpu(), step_ids_from_tokens(row, config)[0].cpu(), logits))
    return probes


@torch.no_grad()
def switched_logits(model: Any, names: dict[int, str | None], probe: Probe) -> Tensor:
    """Logits of plain adapters, switched at every step with the cache kept.

    Args:
        model: A PeftModel that holds the exported adapters.
        names: Step id -> adapter name; None: the base model alone.
        probe: The sequence.

    Returns:
        Logits, (T, V), float32, on the CPU.
    """
    cache: dict[str, Any] = {}
    pieces, start = [], 0
    for step, run in groupby(probe.step_ids.tolist()):
        length = len(list(run))
        ids = probe.ids[None, start : start + length].to(model.device)
        output = _forward(model, names[step], input_ids=ids, use_cache=True, **cache)
        cache = named_cache(output)
        pieces.append(output.logits[0].float().cpu())
        start += length
    return torch.cat(pieces)


def _forward(model: Any, name: str | None, **inputs: Any) -> Any:
    if name is None:
        with model.disable_adapter():
            return model(**inputs)
    model.set_adapter(name)
    return model(**inputs)


def differences(model: Any, names: dict[int, str | None], probes: Sequence[Probe]) -> dict[int, tuple[float, int]]:
    """Per step: the largest difference of a logit from the step-routed model, and the tokens compared."""
    found: dict[int, tuple[float, int]] = {}
    for probe in probes:
        logits = switched_logits(model, names, probe)
        for step in names:
            at = probe.step_ids == step
            if at.any():
                worst, tokens = found.get(step, (0.0, 0))
                here = largest_difference(logits[at], probe.logits[at])
                found[step] = (max(worst, here), tokens + int(at.sum()))
    return found


@torch.no_grad()
def drifts(model: Any, names: dict[int, str | None], probes: Sequence[Probe], config: MoteConfig) -> dict[str, Drift]:
    """Per step: the drift of its logits when its adapter processes everything before it too."""
    result = {}
    for step, name in names.items():
        label = config.steps[step - 1] if step else QUESTION
        routed, alone = [], []
        for probe in probes:
            at = (probe.step_ids == step).nonzero()[:, 0]
            if step == 0 or not len(at):
                continue
            ids = probe.ids[None, : int(at[-1]) + 1].to(model.device)
            alone.append(_forward(model, name, input_ids=ids).logits[0].float().cpu()[at])
            routed.append(probe.logits[at])
        if routed:
            result[label] = _drift(torch.cat(routed), torch.cat(alone))
    return result


def _drift(routed: Tensor, other: Tensor) -> Drift:
    width = min(routed.shape[-1], other.shape[-1])
    routed, other = routed[:, :width], other[:, :width]
    p, q = routed.log_softmax(-1), other.log_softmax(-1)
    kl = torch.where(torch.isfinite(p), p.exp() * (p - q), 0.0).sum(-1)
    same = routed.argmax(-1) == other.argmax(-1)
    return Drift(largest_difference(routed, other), float(kl.mean()), float(same.float().mean()), len(routed))
