"""When training runs the self-check of ``model.selfcheck``: before anything is compiled, or, under ZeRO-3 and FSDP2,
when all ranks can run the model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import TrainerCallback

from axolotl_mote.model.selfcheck import check_generation, check_training
from axolotl_mote.training.args import read_options
from axolotl_mote.training.compat import uses_fsdp, uses_zero3


class SelfCheckCallback(TrainerCallback):
    """Checks a model whose parameters are partitioned: readable, and on the device, once training begins."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Run the check on all ranks, with the same tokens."""
        with precision(self.cfg, model):
            check_training(model, forward=model if uses_fsdp() else None)


def self_check(cfg: Any, model: Any, inference: bool) -> None:
    """Check a loaded model, unless it is switched off or has to wait for ``callbacks``."""
    if read_options(cfg).self_check and not _waits(inference):
        with precision(cfg, model):
            (check_generation if inference else check_training)(model)


def callbacks(cfg: Any) -> list[TrainerCallback]:
    """What the trainer needs to run the check when it begins."""
    return [SelfCheckCallback(cfg)] if read_options(cfg).self_check and _waits(False) else []


def _waits(inference: bool) -> bool:
    return uses_zero3() or (uses_fsdp() and not inference)


def precision(cfg: Any, model: Any) -> AbstractContextManager[object]:
    """The precision that training runs in, given its configuration; some attention kernels take no other."""
    dtype = torch.bfloat16 if cfg.bf16 else torch.float16 if cfg.fp16 else None
    return torch.autocast(model.device.type, dtype=dtype) if dtype else nullcontext()
