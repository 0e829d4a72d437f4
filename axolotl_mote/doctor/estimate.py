"""The line about memory and speed: what was measured here, and what follows from it for the configured run."""

from __future__ import annotations

from collections.abc import Callable

from axolotl_mote.doctor.lines import OK, Finding, NotTestedError
from axolotl_mote.doctor.session import Session
from axolotl_mote.doctor.trained import trained_as_configured

_GIB = 2**30
_ADAM, _EIGHT_BITS = 8, 2
"""Bytes of optimizer state per trained parameter: two float32 moments, or two of one byte."""


def estimate(session: Session) -> Finding:
    """Memory of one training process and its speed; an estimate, except for what was measured in this run."""
    run = trained_as_configured(session)
    memory = run.memory
    if memory is None:
        raise NotTestedError("memory was not measured")
    name = str(session.validated.optimizer or "adamw_torch")
    adapter = memory.trained * (4 + 4 + (_EIGHT_BITS if "8bit" in name else 0 if name == "sgd" else _ADAM))
    longest = int(session.cfg.micro_batch_size) * int(session.cfg.sequence_len)
    each = memory.kept / memory.tokens
    total = memory.weights + adapter + each * longest
    speed = run.tokens / run.seconds
    # Forward, and backward to the activations; frozen weights have no gradient. Recomputation is one more forward.
    work = (6 if session.validated.gradient_checkpointing else 4) * memory.parameters
    peak = f", peak of the GPU {run.peak / _GIB:.1f} GiB" if run.peak else ""
    said = (
        f"measured on {run.device}: {speed:,.0f} tokens/s over {len(run.losses)} steps, start included{peak}; estimate "
        f"for one process: {total / _GIB:.2f} GiB = {memory.weights / _GIB:.2f} weights + {adapter / _GIB:.2f} for "
        f"adapter, gradients and {name} + {each * longest / _GIB:.2f} for {longest} tokens, micro_batch_size x "
        f"sequence_len, at "
        f"{each / 2**20:.2f} MiB a token, measured on one batch of {memory.tokens}; {work / 1e9:.2g} GFLOP a token "
        f"from {memory.parameters / 1e6:.0f} million parameters: at 100 TFLOP/s sustained, no more than "
        f"{1e14 / work:,.0f} tokens/s, which was not measured"
    )
    if session.sharding:
        said += f"; what {session.sharding[1]} shards is counted whole"
    figures = {
        "bytes": float(total),
        "tokens_per_second": speed,
        "flop_per_token": float(work),
        "peak_bytes": float(run.peak),
    }
    return Finding(OK, said, figures=figures)


CHECKS: dict[str, Callable[[Session], Finding]] = {"estimate": estimate}
