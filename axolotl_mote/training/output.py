"""The folder that a run saves to: checked before it trains, and named when the disk is full.

It does not know what is saved; ``training.checkpoints`` judges what is there.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "unexpected pos", "iostream error")
"""What torch.save says, of the system's reason nothing."""


def check_output(folder: Path) -> None:
    """Check that a folder takes files, or that the one that it will be made in does; nothing is left there.

    Raises:
        ValueError: If it does not.
    """
    place = next(path for path in (folder, *folder.parents) if os.path.exists(path))
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
        if not any(reason in str(error) for reason in (*_FULL, *_TORCH_CANNOT_WRITE)):
            raise
        raise OSError(
            f"output_dir must have room for what training saves; got {str(error).splitlines()[0]} at {folder}. Free "
            "some, and go on from the last whole checkpoint with auto_resume_from_checkpoints: true."
        ) from error
