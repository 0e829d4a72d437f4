"""What a training process holds: weights, trained parameters, and what a forward keeps for its backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axolotl_mote.doctor.lines import NotTestedError
from axolotl_mote.model.adapter import mote_model


@dataclass(frozen=True)
class Memory:
    """Sizes of one process.

    Args:
        weights: Bytes of the frozen weights.
        trained: Number of trained parameters.
        parameters: Number of parameters that a token runs through.
        kept: Bytes that the forward of one micro-batch keeps, weights left out.
        tokens: Tokens of that micro-batch, padding included.
    """

    weights: int
    trained: int
    parameters: int
    kept: int
    tokens: int


def measure(trainer: Any) -> Memory:
    """Measure on the first micro-batch of a trainer, whose model stays as it is."""
    model = trainer.model
    tuner = mote_model(model)
    if tuner is None:
        raise NotTestedError("needs adapter: mote")
    trained, total = model.get_nb_trainable_parameters()  # counts 4-bit weights as what they stand for
    frozen = [p for p in model.parameters() if not p.requires_grad]
    table: Any = tuner.model.get_input_embeddings().get_base_layer().weight
    head: Any = tuner.model.get_output_embeddings().get_base_layer().weight
    looked_up = 0 if table is head else table.numel()
    kept, tokens = _kept_for_backward(trainer)
    return Memory(sum(p.numel() * p.element_size() for p in frozen), trained, total - looked_up, kept, tokens)


def _kept_for_backward(trainer: Any) -> tuple[int, int]:
    """Bytes that a forward keeps, and its tokens."""
    model, base = trainer.model, trainer.model.get_base_model()
    batch = next(iter(trainer.get_train_dataloader()))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    recomputes = trainer.args.gradient_checkpointing and not base.is_gradient_checkpointing
    if recomputes:  # the trainer switches it on when it trains
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs)
    mode = model.training
    model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(batch))
    finally:
        model.train(mode)
        if recomputes:
            base.gradient_checkpointing_disable()
    del loss
    return sum(kept.values()), int(batch["input_ids"].numel())
