"""A short name for the content of a model folder, to notice that another model lies where the last run found one."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK = 64 * 1024


def folder_digest(path: Path) -> str:
    """Hash of a model folder without reading all its weights: small files whole, large ones by size and 16 blocks."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            if size < 16 * 2**20:
                digest.update(content.read())
                continue
            for block in range(16):
                content.seek(block * (size - _BLOCK) // 15)
                digest.update(content.read(_BLOCK))
    return digest.hexdigest()[:16]
