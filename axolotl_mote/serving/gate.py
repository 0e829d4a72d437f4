"""The buffer that the engine's LoRA layers multiply by: a row of weights for every scheduled token.

One buffer lives as long as the engine and keeps its address, so that CUDA graphs that read it stay valid. Rows of
tokens that a plain LoRA processes are ones. No vLLM here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from axolotl_mote.serving.routes import Route

TRACE: list[tuple[list[int], list[int]]] | None = None
"""A test sets a list here to see what the engine did: (LoRA slot, step) of the scheduled tokens, forward by forward."""


class Gate:
    """The gate of every scheduled token, and the table of every LoRA slot.

    Args:
        max_tokens: Most tokens of one forward.
        max_rank: Rank of the engine's LoRA buffers, --max-lora-rank.
        device: Where the engine computes.

    Attributes:
        rows: (max_tokens, max_rank), float32: ones for plain LoRA.
        routes: Route of the adapter in each LoRA slot; None for plain LoRA and empty slots.
    """

    def __init__(self, max_tokens: int, max_rank: int, device: torch.device | str) -> None:
        self.rows = torch.ones(max_tokens, max_rank, dtype=torch.float32, device=device)
        self.routes: list[Route | None] = []
        self._tables = self.rows.new_ones(1, 1, max_rank)

    def multiply(self, shrunk: Tensor | Sequence[Tensor]) -> None:
        """Weight inner activations in place: (slices, tokens, R), or slices of shape (tokens, R)."""
        for part in (shrunk,) if isinstance(shrunk, Tensor) else shrunk:
            part.mul_(self.rows[: part.shape[-2]])

    def set_routes(self, routes: list[Route | None]) -> bool:
        """Take the adapters that are in the slots now; does something only when they changed.

        Returns:
            Whether a MoTE adapter is among them.
        """
        if routes != self.routes:
            top = max((route.num_steps for route in routes if route), default=0)
            tables = torch.ones(len(routes) + 1, top + 1, self.rows.shape[1])
            tables[-1] = 0.0  # slot -1, requests of the base: on a CPU vLLM gives them the last slot's LoRA
            for slot, route in enumerate(routes):
                if route:
                    tables[slot, : route.num_steps + 1, : route.rank] = torch.tensor(route.rows)
            self.routes, self._tables = routes, tables.to(self.rows.device)
            self.rows.fill_(1.0)
        return any(routes)

    def update(self, slots: Tensor, steps_of: Callable[[int, Route], Tensor]) -> None:
        """Fill the rows for the coming forward.

        Args:
            slots: LoRA slot of every scheduled token, -1 for the base model, (T,).
            steps_of: Slot and route -> the step of every scheduled token, as if all were that adapter's, (T,).
        """
        steps = torch.zeros_like(slots)
        for slot, route in enumerate(self.routes):
            if route:
                steps = torch.where(slots == slot, steps_of(slot, route), steps)
        self.rows[: len(slots)] = self._tables[slots, steps]
        if TRACE is not None:
            TRACE.append((slots.tolist(), steps.tolist()))
