"""Silences what libraries print while they are imported: missing GPU kernels, their own deprecations.

No user can act on these messages. Only the commands silence them; training keeps axolotl's logging.
"""

from __future__ import annotations

import logging
import warnings

_NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def silence_imports() -> None:
    """Call before torch, transformers or peft is imported."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torchao|bitsandbytes|torch\.jit)\b")
