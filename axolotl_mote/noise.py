"""What the libraries say while they are imported and no user can act upon: missing GPU kernels, other people's
deprecations. The commands silence it; training keeps axolotl's own logging.
"""

from __future__ import annotations

import logging
import warnings

_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")


def silence_imports() -> None:
    """Call before torch, transformers or peft is imported."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torchao|bitsandbytes|torch\.jit)\b")
