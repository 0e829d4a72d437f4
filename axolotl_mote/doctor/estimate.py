"""The line about memory and speed: what was measured here, and what follows from it for the configured run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from axolotl_mote.doctor.lines import OK, Finding
from axolotl_mote.doctor.probes import training
from axolotl_mote.doctor.session import Session, TrainedRun
from axolotl_mote.doctor.trained import trained_as_configured

_GIB = 2**30
_STATE = {"adam": 8, "8bit": 2, "sgd": 0}
"""Bytes of optimizer state per trained parameter, by a part of the optimizer's name; Adam's for all others."""


def estimate(session: Session) -> Finding:
    """Memory of one training process and its speed; an estimate, except for what was measured in this run."""
    weights, trained, parameters = _sizes(session)
    kept, tokens = _kept_for_backward(session)
    run = trained_as_configured(session)
    name = str(session.validated.optimizer or "adamw_torch")
    state = next((size for part, size in _STATE.items() if part in name and part != "adam"), _STATE["adam"])
    adapter = trained * (4 + 4 + state)
    longest = int(session.cfg.micro_batch_size) * int(session.cfg.sequence_len)
    activations = kept / tokens * longest
    total = weights + adapter + activations
    speed = run.tokens / run.seconds if run.seconds else 0.0
    # Forward, and backward to the activations; frozen weights have no gradient. Recomputation is one more forward.
    work = (6 if session.validated.gradient_checkpointing else 4) * parameters
    said = [
        f"estimate for one process: {total / _GIB:.1f} GiB = {weights / _GIB:.2f} weights + {adapter / _GIB:.2f} adapter, "
        f"gradients and {name} + {activations / _GIB:.1f} activations at {longest} tokens (micro_batch_size x "
        f"sequence_len), from {kept / tokens / 1024:.0f} KiB a token measured on one batch"
    ]
    if session.raw.get("deepspeed"):
        said.append("DeepSpeed shards a part of it, which is not counted")
    said.append(_measured(run, speed))
    said.append(
        f"{work / 1e9:.2f} GFLOP a token, so a GPU that sustains 100 TFLOP/s would do about {1e14 / work:,.0f} tokens/s; "
        "no such GPU was measured"
    )
    figures = {"bytes": total, "tokens_per_second": speed, "flop_per_token": float(work), "peak_bytes": float(run.peak)}
    return Finding(OK, "; ".join(said), figures=figures)


def _measured(run: TrainedRun, speed: float) -> str:
    peak = f", peak {run.peak / _GIB:.1f} GiB" if run.peak else ""
    return f"measured on {run.device}: {speed:,.0f} tokens/s over {len(run.losses)} steps, start included{peak}"


def _sizes(session: Session) -> tuple[float, int, int]:
    """Bytes of the frozen weights, trained parameters, and all parameters that tokens run through."""
    named = list(session.tuner.named_parameters())
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for _, p in named if not p.requires_grad)
    table: Any = session.tuner.model.get_input_embeddings().get_base_layer().weight
    tied = table is session.tuner.model.get_output_embeddings().get_base_layer().weight
    through = sum(p.numel() for _, p in named) - (0 if tied else table.numel())
    return float(weights), trained, through


def _kept_for_backward(session: Session) -> tuple[float, int]:
    """Bytes that the forward of the first batch keeps for its backward pass beside weights, and its tokens."""
    batch = next(iter(session.trainer.get_train_dataloader()))
    own = {p.untyped_storage().data_ptr() for p in session.tuner.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    base: Any = session.tuner.model
    if session.cfg.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=session.cfg.gradient_checkpointing_kwargs)
        base.enable_input_require_grads()
    try:
        with (
            training(session.tuner),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            session.trainer.compute_loss_context_manager(),
        ):
            loss = session.trainer.compute_loss(session.trainer.model, dict(batch))
    finally:
        if session.cfg.gradient_checkpointing:
            base.disable_input_require_grads()
            base.gradient_checkpointing_disable()
    del loss
    return float(sum(kept.values())), int(batch["input_ids"].numel())


CHECKS: dict[str, Callable[[Session], Finding]] = {"estimate": estimate}
