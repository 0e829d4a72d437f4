"""Checkpoints that a run was killed in the middle of: never resumed from.

transformers writes a checkpoint file by file, and axolotl resumes from the one with the highest number, whole or not.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

STATE = "trainer_state.json"
"""What transformers writes last."""

_ARCHIVES = (".pt", ".pth", ".bin")
"""Files of torch.save, which are zip archives: the table of contents stands at their end."""

_OLD_PICKLE = b"\x80"
"""How files begin that torch wrote without an archive; they cannot be checked without reading them."""

LOG = logging.getLogger("axolotl.mote")  # below axolotl's logger, so that its handlers print it


def checkpoint_fault(folder: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is.

    Nothing is unpickled. Files that were not written at all are noticed by ``trainer_state.json``, which comes last.
    """
    state = folder / STATE
    try:
        step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{STATE} is {'torn' if state.is_file() else 'missing'}"
    if re.fullmatch(r"checkpoint-\d+", folder.name) and folder.name != f"checkpoint-{step}":
        return f"{STATE} is of step {step}"
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = path.relative_to(folder)
        if path.suffix in _ARCHIVES and not zipfile.is_zipfile(path) and _begins(path) != _OLD_PICKLE:
            return f"{name} is torn"
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except (SafetensorError, OSError):
                return f"{name} is torn"
    return None


def choose_checkpoint(cfg: Any) -> None:
    """Have a run resume from a whole checkpoint only.

    Args:
        cfg: The validated configuration. With ``auto_resume_from_checkpoints`` it gets the last whole checkpoint of
            ``output_dir``, or none.

    Raises:
        ValueError: If ``resume_from_checkpoint`` names one that is not whole.
    """
    named = cfg.resume_from_checkpoint
    if named and isinstance(named, str):
        if Path(named).is_dir() and (fault := checkpoint_fault(Path(named))):
            whole = [folder for folder in _checkpoints(Path(named).parent) if checkpoint_fault(folder) is None]
            way_out = f"Use {whole[0]}." if whole else "Start anew."
            raise ValueError(f"resume_from_checkpoint must name a whole checkpoint; got {named}: {fault}. {way_out}")
    elif cfg.auto_resume_from_checkpoints and named is None:
        for number, folder in enumerate(_checkpoints(Path(cfg.output_dir))):
            if (fault := checkpoint_fault(folder)) is None:
                if number:
                    cfg.resume_from_checkpoint = str(folder)
                return
            LOG.warning("%s is not resumed from: %s. A run was killed while it saved.", folder, fault)
        cfg.auto_resume_from_checkpoints = False


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, the latest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True)
