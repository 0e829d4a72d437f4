"""The chain that is tested, and the states in which it is: random experts, training without dropout.

Fresh experts change nothing, so a wrong route would not show. Random ones make every expert count; their values come
back afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from axolotl_mote.chain.steps import IGNORE_INDEX
from axolotl_mote.doctor.session import Session
from axolotl_mote.model.adapter import MoteLinear, MoteModel
from axolotl_mote.model.loss import shift

_QUESTION, _WORDS = 96, 6  # most tokens of the question; tokens of each step
_STRENGTH = 0.1  # about the size of an expert's update beside the layer's output


@dataclass(frozen=True)
class Probe:
    """A short chain with every step, of the user's own text.

    Args:
        question: Tokens before the first step.
        texts: Tokens of each step, without its markers.
        end: Tokens of the end of the turn.
        marker_ids: Start and end of each step.
    """

    question: list[int]
    texts: list[list[int]]
    end: list[int]
    marker_ids: list[int]

    def tokens(self, without: int = 0) -> list[int]:
        """The whole chain, or the chain without a step (1 is the first)."""
        return [*self.question, *self.step_tokens(without), *self.end]

    def step_tokens(self, without: int = 0) -> list[int]:
        """The tokens inside steps alone, markers included: no token is routed as a question."""
        ids: list[int] = []
        for step, text in enumerate(self.texts, start=1):
            if step != without:
                ids += [self.marker_ids[2 * step - 2], *text, self.marker_ids[2 * step - 1]]
        return ids


def probe_chain(session: Session) -> Probe:
    """The shortest of the chains that have the most steps, cut short; steps that it lacks get words of their own."""
    return session.once("chain", lambda: _probe(session))


def _probe(session: Session) -> Probe:
    vocabulary, codec = session.codec.vocabulary, session.codec
    rows = session.data.train_dataset["input_ids"]
    best = min(rows, key=lambda ids: (-len(set(vocabulary.step_ids(ids))), len(ids)))
    steps = vocabulary.step_ids(best)
    first = next((place for place, step in enumerate(steps) if step), len(best))
    texts = []
    for number, name in enumerate(vocabulary.steps, start=1):
        own = [
            token for token, step in zip(best, steps, strict=True) if step == number and token not in vocabulary.kinds
        ]
        words = own + codec.encode_text(f" some words of the step {name} that stand here to be tested")
        texts.append(words[:_WORDS])
    return Probe(list(best[:first][-_QUESTION:]), texts, list(codec.end_of_turn), vocabulary.marker_ids)


def on_device(session: Session, ids: list[int]) -> Tensor:
    """Token ids as one row, shape (1, T)."""
    return torch.tensor([ids], device=session.tuner.model.device)


def wrong_route(step_ids: Tensor, num_steps: int) -> Tensor:
    """Each step's tokens sent to the next step's expert, shape (B, T); with one step that is the same one."""
    return torch.where(step_ids > 0, step_ids % num_steps + 1, step_ids)


def expert_layers(tuner: MoteModel) -> dict[str, MoteLinear]:
    """The layers with experts, by name."""
    return {name: module for name, module in tuner.model.named_modules() if isinstance(module, MoteLinear)}


SHARED = "the shared expert"


def idle_experts(expert_weight: float, steps: Sequence[str]) -> set[str]:
    """Names of the experts that the configuration gives no weight, so that they cannot learn."""
    return {SHARED} if expert_weight == 1 else set(steps) if expert_weight == 0 else set()


@contextmanager
def random_experts(tuner: MoteModel) -> Iterator[None]:
    """Experts that all differ and count; the own values come back afterwards."""
    config = tuner.routing.configs["default"]
    scale = _STRENGTH * math.sqrt(3 / config.r) / max(config.scaling, 1e-6)
    generator = torch.Generator().manual_seed(0)
    weights = [cast(Any, layer.lora_B["default"]).weight for layer in expert_layers(tuner).values()]
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        yield
    finally:
        with torch.no_grad():
            for weight, own in zip(weights, before, strict=True):
                weight.copy_(own)


@contextmanager
def evaluating(tuner: MoteModel) -> Iterator[None]:
    """Evaluation mode without gradients."""
    with _modes(tuner), torch.no_grad():
        tuner.eval()
        yield


@contextmanager
def training(tuner: MoteModel) -> Iterator[None]:
    """Training mode, random routing and step dropout included, but without dropout of activations."""
    with _modes(tuner):
        tuner.train()
        for module in tuner.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        yield


@contextmanager
def dropping(tuner: MoteModel, step: int) -> Iterator[None]:
    """Drop one step (1 is the first) in every forward, or none with 0; questions go where they go at inference.

    Random question routing depends on every token of a document, so it would answer to a token that is dropped.
    """
    routing, base = tuner.routing, cast(Any, tuner.model)
    dropout, config, mode = routing.step_dropout, routing.configs["default"], base.training
    routing.step_dropout = tuple(float(number == step) for number in range(1, len(dropout) + 1))
    routing.configs["default"] = copy.copy(config)
    routing.configs["default"].question_routing = "mean"
    base.training = True  # of this module alone: what routes, not what drops activations
    try:
        yield
    finally:
        base.training = mode
        routing.configs["default"], routing.step_dropout = config, dropout


@contextmanager
def _modes(tuner: MoteModel) -> Iterator[None]:
    modes = [(module, module.training) for module in tuner.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def gradients(
    session: Session, tokens: Tensor, step_ids: Tensor | None = None, between: Any = None
) -> dict[str, Tensor]:
    """Gradients of the adapter for the loss of a chain, on the CPU, by parameter.

    Args:
        session: The session.
        tokens: The chain, shape (1, T).
        step_ids: Another route than the tokens', shape (1, T).
        between: Called between the forward and the backward pass.
    """
    tuner = session.tuner
    targets = shift(tokens, IGNORE_INDEX)
    options = {} if step_ids is None else {"step_ids": step_ids}
    with session.precision():
        loss = tuner(input_ids=tokens, targets=targets, **options).loss.sum()
    if between is not None:
        between()
    trained = {name: p for name, p in tuner.named_parameters() if p.requires_grad}
    loss.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.detach() for name, p in trained.items()}
    found = {name: gradient.float().cpu().clone() for name, gradient in found.items()}
    for p in trained.values():
        p.grad = None
    return found
