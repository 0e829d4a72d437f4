"""Files that users write in YAML, checked by a pydantic schema: unknown keys are errors, all faults come at once."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class Schema(BaseModel):
    """A block of such a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Schema)


def load_yaml(path: str | Path, schema: type[S], name: str) -> S:
    """Read a file. Relative paths in it refer to the working directory, as in axolotl.

    Args:
        path: The file.
        schema: What it must follow.
        name: What it is called in errors, such as "build file".

    Raises:
        ValueError: If the file is missing, holds no YAML mapping or breaks the schema; all faults at once.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"the {name} must be readable YAML; got {path}: {error}. Correct the file.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"the {name} must hold a mapping; got {type(raw).__name__} in {path}. See --help.")
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, fault['loc'])) or '(file)'}: {fault['msg']}" for fault in error.errors()]
        raise ValueError(f"{path} must follow the schema of the {name}:\n" + "\n".join(faults)) from error
