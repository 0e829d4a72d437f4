"""The exported parts against the gated model: equal where switched per token, and how far off where not.

Exact: every token is processed by the adapter of its step, and the KV cache is kept when the adapter changes.
Not exact: a server that has one adapter per request and computes the earlier steps anew under the last step's adapter
("re-prefilling"). Their keys and values then differ from those the step was trained with. `Drift` says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from axolotl_mote.config import MoteConfig
from axolotl_mote.export.weights import largest_difference
from axolotl_mote.generation.decoding import evaluating
from axolotl_mote.routing import step_ids_from_tokens
from axolotl_mote.steps import QUESTION


@dataclass(frozen=True)
class Probe:
    """A question with its chain, and what the gated model says about every token of it.

    Args:
        ids: Tokens, (T,).
        step_ids: Their steps, (T,).
        logits: Logits of the gated model, (T, V), float32, on the CPU.
    """

    ids: Tensor
    step_ids: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Drift:
    """What re-prefilling everything before a step under that step's adapter does to the step's logits.

    Args:
        largest: Largest absolute difference of a logit.
        mean_kl: Mean KL divergence from the gated model, nats a token.
        same_top: Share of tokens whose likeliest successor stays the same.
        tokens: Tokens compared.
    """

    largest: float
    mean_kl: float
    same_top: float
    tokens: int


@torch.no_grad()
def make_probes(model: Any, config: MoteConfig, sequences: Sequence[Sequence[int]]) -> list[Probe]:
    """Record the gated model's logits on whole sequences."""
    probes = []
    with evaluating(model):
        for ids in sequences:
            row = torch.tensor([list(ids)], device=model.device)
            logits = model(input_ids=row).logits[0].float().cpu()
            probes.append(Probe(row[0].cpu(), step_ids_from_tokens(row, config)[0].cpu(), logits))
    return probes


@torch.no_grad()
def switched_logits(model: Any, names: dict[int, str | None], probe: Probe) -> Tensor:
    """Logits of plain adapters when each run of tokens is processed by its step's adapter and the cache is kept.

    Args:
        model: A PeftModel that holds the exported adapters.
        names: Step id -> adapter name; None: the base model alone.
        probe: What to run.

    Returns:
        Logits, (T, V), float32, on the CPU.
    """
    cache, pieces, start = None, [], 0
    for step, run in groupby(probe.step_ids.tolist()):
        length = len(list(run))
        ids = probe.ids[None, start : start + length].to(model.device)
        output = _forward(model, names[step], input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
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
    """Per step: the largest difference of a logit between exported and gated model, and the tokens compared."""
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
    """Per step: the drift of its logits when everything before it is processed by its adapter too."""
    result = {}
    for step, name in names.items():
        label = config.steps[step - 1] if step else QUESTION
        gated, alone = [], []
        for probe in probes:
            at = (probe.step_ids == step).nonzero()[:, 0]
            if step == 0 or not len(at):
                continue
            ids = probe.ids[None, : int(at[-1]) + 1].to(model.device)
            alone.append(_forward(model, name, input_ids=ids).logits[0].float().cpu()[at])
            gated.append(probe.logits[at])
        if gated:
            result[label] = _drift(torch.cat(gated), torch.cat(alone))
    return result


def _drift(gated: Tensor, other: Tensor) -> Drift:
    width = min(gated.shape[-1], other.shape[-1])
    gated, other = gated[:, :width], other[:, :width]
    p, q = gated.log_softmax(-1), other.log_softmax(-1)
    kl = torch.where(torch.isfinite(p), p.exp() * (p - q), 0.0).sum(-1)
    same = gated.argmax(-1) == other.argmax(-1)
    return Drift(largest_difference(gated, other), float(kl.mean()), float(same.float().mean()), len(gated))
