"""What an adapter's folder says about routing, and the step of every scheduled token. Tensors only; no vLLM.

A step depends on earlier tokens through one number per request alone: the step that goes on after its last computed
token, 0 when none is open. It is called *carry* here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.generation.folder import read_config_values, read_mote_config
from axolotl_mote.model.config import PEFT_TYPE, MoteConfig
from axolotl_mote.model.routing import gate_table, step_ids_from_tokens

NO_TOKEN = -1

MAX_STEPS = 15
"""The V2 runner's kernel keeps a place and its step in one number, four bits of it for the step."""


@functools.lru_cache(maxsize=64)
def _on(device: torch.device, ids: tuple[int, ...]) -> Tensor:
    """Marker ids on a device, copied once: row k belongs to step k, row 0 to none."""
    return torch.tensor([NO_TOKEN, *ids], device=device)


@dataclass(frozen=True)
class Route:
    """How the tokens of one adapter are routed.

    Args:
        vocabulary: Steps and marker ids.
        rows: Weight of every rank for every step, (S + 1) x R, without lora_alpha / r: vLLM scales B by it on loading.
    """

    vocabulary: StepVocabulary
    rows: tuple[tuple[float, ...], ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self | None:
        """The route of a MoTE adapter; None for a folder of any other kind.

        Raises:
            ValueError: If adapter_config.json is missing or broken, or a MoTE adapter's values are wrong.
        """
        folder = Path(folder)
        if read_config_values(folder).get("peft_type") != PEFT_TYPE:
            return None
        return cls.from_config(read_mote_config(folder))

    @classmethod
    def from_config(cls, config: MoteConfig) -> Self:
        """The route of a configuration."""
        rows = (gate_table(config) / config.scaling).tolist()
        return cls(config.vocabulary, tuple(map(tuple, rows)))

    @property
    def rank(self) -> int:
        """Rank R of the one LoRA that holds every expert."""
        return len(self.rows[0])

    @property
    def num_steps(self) -> int:
        """Number of steps S."""
        return self.vocabulary.num_steps

    def after(self, tokens: Tensor, steps: Tensor) -> Tensor:
        """The step that goes on after each token: its own, or 0 if the token is the end marker of its step."""
        return torch.where(_on(tokens.device, self.vocabulary.end_ids)[steps] == tokens, 0, steps)


@dataclass(frozen=True)
class Scheduled:
    """The tokens that an engine computes in one forward: those of all requests, one request after the other.

    Args:
        tokens: Token ids, (T,), int64.
        first: Index of each request's first token, (N,), int64.
        request: Request of each token, 0 to N - 1, (T,), int64.
        carry: Step that is open before each request's first token, (N,), int64.
    """

    tokens: Tensor
    first: Tensor
    request: Tensor
    carry: Tensor

    def steps(self, route: Route) -> Tensor:
        """Step of every token, (T,), int64, as if all requests were this adapter's.

        A start marker that stands for the carry is put before each request's tokens; then the function that training
        uses does the routing, on one packed row with a document per request. Nothing waits for the device.
        """
        index = torch.arange(len(self.tokens), device=self.tokens.device)
        place = index + self.request + 1
        row = torch.empty(len(self.tokens) + len(self.first), dtype=torch.int64, device=index.device)
        position = torch.zeros_like(row)
        head = self.first + torch.arange(len(self.first), device=index.device)
        row[head] = _on(index.device, route.vocabulary.start_ids)[self.carry]
        row[place] = self.tokens
        position[place] = index - self.first[self.request] + 1
        return step_ids_from_tokens(row[None], route.vocabulary, position[None])[0, place]
