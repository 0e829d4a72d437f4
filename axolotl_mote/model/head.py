"""The model's own path from hidden states to logits, run on any rows of them.

Models scale, cap, slice and mask their logits, each in code and under names of its own. Nothing is guessed from
configurations: the model's own forward runs, with a stand-in where its decoder is. No loss, no steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from axolotl_mote.model.compat import text_decoder


def logits_path(
    model: PreTrainedModel,
    head: nn.Module | None = None,
    turn: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Callable[[Tensor], Tensor]:
    """What a model does behind its decoder, as a function of any tokens' hidden states.

    Args:
        model: A causal language model.
        head: Runs in place of the model's LM head; None means the model's own.
        turn: Keeps other threads' forwards out while the stand-in is there, also when a call is repeated in the
            backward pass.

    Returns:
        Hidden states (N, D) -> logits (N, V).
    """
    decoder = text_decoder(model)
    place = _place(model, decoder)
    heads = {} if head is None else {_place(model, model.get_output_embeddings()): head}

    def logits(hidden: Tensor) -> Tensor:
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with turn(), _replaced(model, {place: _StandIn(getattr(model, place), decoder, hidden), **heads}):
            # The function of the class: no hook on the model, and no routing, sees this call.
            found: Tensor = type(model).forward(model, input_ids=tokens).logits
        return found[0]

    return logits


def _place(model: nn.Module, module: nn.Module) -> str:
    """Name of the model's child that a module is, or is in."""
    return next(name for name, child in model.named_children() if any(one is module for one in child.modules()))


@contextmanager
def _replaced(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Put modules in the places of a model's children inside the block; what is registered there stays registered."""
    originals = {name: getattr(model, name) for name in modules}

    def put(children: dict[str, nn.Module]) -> None:
        for name, child in children.items():
            setattr(model, name, child)

    put(modules)
    try:
        yield
    finally:
        put(originals)


class _StandIn(nn.Module):
    """What a model calls instead of its decoder: it returns given hidden states and is otherwise what it replaces.

    Args:
        original: The child of the model that it replaces.
        decoder: The decoder, which the child is or holds.
        hidden: Hidden states, shape (N, D).
    """

    def __init__(self, original: nn.Module, decoder: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__.update(original=original, decoder_=decoder, hidden=hidden)  # not its children

    def forward(self, *_: Any, **__: Any) -> _Hidden:
        return _Hidden(self.hidden.unsqueeze(0))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["original"], name)
        return self if value is self.__dict__["decoder_"] else value  # some models call model.decoder


@dataclass
class _Hidden(ModelOutput):
    """A decoder's output that holds hidden states, and None for whatever else a model asks for."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
