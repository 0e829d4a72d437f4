"""An exported folder to the arguments of ``vllm serve``. No vLLM, no models."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from axolotl_mote.export.served import ADAPTER, BASE, FORMAT, REPORT, served_rank
from axolotl_mote.generation.folder import read_mote_config, read_shapes
from axolotl_mote.generation.loading import load_tokenizer

PARSER = "mote"
"""Value of --reasoning-parser."""

PROCESSOR = "axolotl_mote.serving.logits:StepProcessor"
"""Value of --logits-processors."""

_OURS = ("--reasoning-parser", "--logits-processors", "--enable-lora", "--no-enable-lora", "--model", "--tokenizer")
"""Flags whose values are fixed."""


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
    given = [_dashed(argument) for argument in given]
    flags = {flag.split("=")[0] for flag in given if flag.startswith("--")}
    if wrong := sorted(flags & set(_OURS)):
        raise ValueError(f"{wrong[0]} must be left to `axolotl mote serve`, which sets it. Remove it.")
    modules, rest = _lora_modules(given)
    loras = [f"{name}={folder / ADAPTER}", *modules]
    sizes = {
        "--max-lora-rank": served_rank(config.total_rank),
        "--max-loras": len(loras) + 1,  # on a CPU vLLM gives requests of the base the last slot: it stays free
        "--max-cpu-loras": len(loras) + 1,
        "--served-model-name": "base",
    }
    if not any(flag.startswith("--structured-outputs-config") for flag in flags):
        sizes["--structured-outputs-config.enable_in_reasoning"] = "true"  # a request without steps may have a format
    ours = [item for flag, value in sizes.items() if flag not in flags for item in (flag, str(value))]
    fixed = ["--enable-lora", "--lora-modules", *loras, "--reasoning-parser", PARSER, "--logits-processors", PROCESSOR]
    return [str(folder / BASE), *fixed, *ours, *rest]


def _dashed(argument: str) -> str:
    """A flag as vLLM reads it: underscores are dashes."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and "." not in name else argument


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of a flag that is written as ``--flag value`` or ``--flag=value``; None if it is not given."""
    for index, argument in enumerate(arguments):
        if argument == flag:
            return arguments[index + 1] if index + 1 < len(arguments) else None
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def _lora_modules(given: list[str]) -> tuple[list[str], list[str]]:
    """The user's own values of --lora-modules, and the other flags."""
    flag = "--lora-modules"
    if flag not in given:
        return [], given
    begin = given.index(flag)
    end = next((n for n in range(begin + 1, len(given)) if given[n].startswith("--")), len(given))
    return given[begin + 1 : end], given[:begin] + given[end:]


def _check_folder(folder: Path) -> None:
    report = folder / REPORT
    try:
        form = json.loads(report.read_text(encoding="utf-8")).get("format")
    except (OSError, ValueError, AttributeError):
        form = None
    if form != FORMAT:
        raise ValueError(
            f"DIR must be a folder that `axolotl mote export --format vllm` wrote; got {folder}. "
            "Export the adapter first."
        )
