"""The versions of other packages that this one was tested with; the error where a private name of theirs is gone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

TESTED = {
    "torch": ">=2.11,<2.14",
    "transformers": ">=5.16,<5.25",
    "peft": ">=0.20,<0.22",
    "axolotl": "==0.19.0" if sys.version_info < (3, 12) else ">=0.21,<0.22",
    "inspect_ai": "==0.3.285",
    "vllm": "==0.32.0",
}
"""By package; pyproject.toml says the same to pip."""


@contextmanager
def private_names() -> Iterator[None]:
    """Name the version that is needed where one of the names inside the block does not exist.

    Example:
        >>> with private_names():
        ...     from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    Raises:
        ImportError: If a package of ``TESTED`` is installed and lacks the name.
    """
    try:
        yield
    except (AttributeError, ImportError) as error:
        package = _owner(error)
        if package not in TESTED or error.name == package:  # another package, or one that is not installed
            raise
        raise ImportError(
            f"{package} must be {TESTED[package]}, the versions that axolotl_mote was tested with; got "
            f"{metadata.version(package)}: {error}. Run: pip install '{package}{TESTED[package]}'",
            name=error.name,
        ) from error


def _owner(error: AttributeError | ImportError) -> str:
    """The package that a missing name was looked for in."""
    if isinstance(error, ImportError):
        return (error.name or "").partition(".")[0]
    owner = error.obj
    return str(getattr(owner, "__module__", None) or getattr(owner, "__name__", "")).partition(".")[0]
