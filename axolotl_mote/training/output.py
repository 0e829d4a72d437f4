"""The folder that a run saves to: checked before it trains, and named when the disk is full.

It does not know what is saved; ``training.checkpoints`` judges what is there.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_ELSEWHERE = ("NCCL", "/dev/shm", "http")
"""Other places that can be full: what a message names with them is not the disk."""

_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "unexpected pos", "iostream error")
"""What torch.save says, of the system's reason nothing."""


def check_output(folder: Path) -> None:
    """Check that a folder takes files, or that the one that it will be made in does; nothing is left there.

    Raises:
        ValueError: If it does not.
    """
    if str(folder).startswith("~"):  # transformers expands it, axolotl does not
        raise ValueError(f"output_dir must be a whole path; got {folder}. Write out what ~ stands for.")
    place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ValueError(
            f"output_dir must be writable; got {error.strerror} at {place}. Set another folder."
        ) from error


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Say which folder has no room, and what to do: what saves there names no path, and torch no reason.

    Raises:
        OSError: In place of the error of a full disk; any other one stays as it is.
    """
    try:
        yield
    except Exception as error:
        said = [
            line for line in str(error).splitlines() if any(reason in line for reason in (*_FULL, *_TORCH_CANNOT_WRITE))
        ]
        if not said or any(place in str(error) for place in _ELSEWHERE):
            raise
        raise OSError(
            f"output_dir must have room for what training saves; got {said[0]} at {folder}. Free some, and go on from "
            "the last whole checkpoint with auto_resume_from_checkpoints: true."
        ) from error


def share_weights(folder: Path) -> None:
    """Let whoever may read an adapter's configuration read its weights: safetensors writes for the owner only."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    with suppress(OSError):  # not there, or another user's
        weights.chmod(config.stat().st_mode)
