"""An exported folder to the arguments of ``vllm serve``. No vLLM, no models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from axolotl_mote.export.served import ADAPTER, BASE, FORMAT, REPORT, served_rank
from axolotl_mote.generation.folder import read_mote_config, read_shapes
from axolotl_mote.generation.loading import load_tokenizer

PARSER = "mote"
"""Value of --reasoning-parser."""

PROCESSOR = "axolotl_mote.serving.logits:StepProcessor"
"""Value of --logits-processors."""

FORMATS = "--structured-outputs-config"
IN_REASONING = "enable_in_reasoning"
"""Whether a request's format holds from the first token: vLLM never learns that reasoning ends, see ``parser``."""

_MODULES = "--lora-modules"
_FIXED = (
    *("--reasoning-parser", "--logits-processors", "--enable-lora", "--no-enable-lora", "--model", "--tokenizer"),
    "--chat-template",
)
"""Flags whose values are fixed."""

_SIZES = ("--max-lora-rank", "--max-loras", "--max-cpu-loras", "--served-model-name")
_BEFORE = ("--name", "--dry-run", "--check")
"""Options of `axolotl mote serve` itself."""


def serve_arguments(folder: Path, name: str, given: Sequence[str] = ()) -> list[str]:
    """What follows ``vllm serve``.

    Args:
        folder: Written by ``axolotl mote export --format vllm``.
        name: Name that requests give in ``model``.
        given: Further flags of the user; they replace ours where both are given, except for those that are fixed.

    Returns:
        The arguments: the base, the adapter under its name, the sizes that it needs, the parser, the step grammar.

    Raises:
        ValueError: If the folder is not such an export, its files do not fit each other, or a fixed flag is given.
    """
    _check_folder(folder)
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise ValueError("VLLM_USE_RUST_FRONTEND must be off: it does not keep text from becoming markers. Unset it.")
    config = read_mote_config(folder / ADAPTER)
    read_shapes(folder / ADAPTER, config)
    load_tokenizer(folder / BASE, str(folder / BASE), config)  # the ids of its markers are checked
    given = [_dashed(argument) for argument in given if argument != "--"]
    in_file = _flags_of_file(value_of("--config", given))
    flags = {flag.split("=")[0] for flag in given if flag.startswith("--")} | in_file.keys()
    _check_flags(flags, in_file.keys())
    modules, rest = _take(_MODULES, given)
    _check_name(name, _take("--served-model-name", rest)[0] or in_file.get("--served-model-name") or ["base"])
    loras = [_module(name, folder / ADAPTER), *modules]
    sizes = {
        "--max-lora-rank": served_rank(config.total_rank),
        "--max-loras": len(loras) + 1,  # on a CPU vLLM gives requests of the base the last slot: it stays free
        "--max-cpu-loras": len(loras) + 1,
        "--served-model-name": "base",
    }
    ours = [item for flag, value in sizes.items() if flag not in flags for item in (flag, str(value))]
    fixed = ["--enable-lora", _MODULES, *loras, "--reasoning-parser", PARSER, "--logits-processors", PROCESSOR]
    return [str(folder / BASE), *fixed, *ours, *_with_formats(rest)]


def _dashed(argument: str) -> str:
    """A flag as vLLM reads it: underscores of its name are dashes."""
    flag, equals, value = argument.partition("=")
    name, dot, key = flag.partition(".")
    return name.replace("_", "-") + dot + key + equals + value if name.startswith("--") else argument


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The last value of a flag, written as ``--flag value`` or ``--flag=value``; None if it is not given."""
    found = _take(flag, arguments)[0]
    return found[-1] if found else None


def _take(flag: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """All values of a flag, however often and however it is written, and the other arguments."""
    values: list[str] = []
    rest: list[str] = []
    takes = False
    for argument in arguments:
        takes = argument == flag or (takes and not argument.startswith("-"))
        if takes:
            values += [] if argument == flag else [argument]
        elif argument.startswith(f"{flag}="):
            values.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return values, rest


def _flags_of_file(path: str | None) -> dict[str, Any]:
    """The flags that vLLM reads from the YAML file of --config, and their values."""
    if path is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config must be a YAML file; got {path}: {error}. Correct it.") from error
    return {_dashed(f"--{key}"): value for key, value in values.items()} if isinstance(values, dict) else {}


def _check_flags(flags: Iterable[str], in_file: Iterable[str]) -> None:
    """Refuse what would switch routing off, and what vLLM would read as another flag than we do."""
    for flag in sorted(flags):
        if flag in _FIXED:
            raise ValueError(f"{flag} must be left to `axolotl-mote serve`, which sets it. Remove it.")
        if flag in _BEFORE:
            raise ValueError(f"{flag} must stand before DIR; got it behind. Move it.")
        # argparse takes the beginning of a flag for the flag.
        whole = [full for full in (*_FIXED, *_SIZES, _MODULES, FORMATS) if full.startswith(flag) and full != flag]
        if whole and flag not in _SIZES:
            raise ValueError(f"{flag} must be written out; got the beginning of {whole[0]}. Write it whole.")
    for flag in (_MODULES, FORMATS):
        if any(key.split(".")[0] == flag for key in in_file):
            raise ValueError(
                f"{flag} must stand on the command line, where ours is added; got it in --config. Move it."
            )


def _check_name(name: str, taken: str | Sequence[str]) -> None:
    taken = [taken] if isinstance(taken, str) else list(taken)
    if not name or name in taken:
        raise ValueError(f"--name must be a name that the base does not have, {taken}; got {name!r}. Choose another.")


def _module(name: str, folder: Path) -> str:
    """A value of --lora-modules; vLLM takes NAME=PATH only without commas."""
    if "," in str(folder) or "," in name or "=" in name:
        return json.dumps({"name": name, "path": str(folder)})
    return f"{name}={folder}"


def _with_formats(given: Sequence[str]) -> list[str]:
    """The user's flags, with formats that hold where a request asks for one, unless the user says otherwise."""
    if value_of(f"{FORMATS}.{IN_REASONING}", given) is not None:
        return list(given)
    values, rest = _take(FORMATS, given)
    if not values:
        return [f"{FORMATS}.{IN_REASONING}", "true", *given]
    try:
        merged = {IN_REASONING: True} | json.loads(values[-1])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{FORMATS} must be a JSON object; got {values[-1]!r}: {error}. Correct it.") from error
    return [FORMATS, json.dumps(merged), *rest]


def _check_folder(folder: Path) -> None:
    report = folder / REPORT
    try:
        form = json.loads(report.read_text(encoding="utf-8")).get("format")
    except (OSError, ValueError, AttributeError):
        form = None
    if form != FORMAT:
        raise ValueError(
            f"DIR must be a folder that `axolotl-mote export --format vllm` wrote; got {folder}. "
            "Export the adapter first."
        )
