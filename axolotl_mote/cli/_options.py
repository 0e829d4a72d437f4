"""Options and errors that several commands share; no torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def model_options(function: F) -> F:
    """--adapter, --base-model, --dtype, --device."""
    return _all(
        click.option(
            "--adapter",
            required=True,
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Output folder of training.",
        ),
        click.option("--base-model", help="Base model folder or name; default: the one in adapter_config.json."),
        click.option(
            "--dtype",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="Type of the base model's weights; auto keeps that of the checkpoint.",
        ),
        click.option("--device", help="Such as cpu or cuda:0; default: the first GPU, else the CPU."),
    )(function)


def decoding_options(function: F) -> F:
    """--check, --max-new-tokens, --step-limit, --sample and its options."""
    return _all(
        click.option("--check", is_flag=True, help="Let the trained check step judge the answer."),
        click.option(
            "--max-new-tokens",
            default=512,
            show_default=True,
            type=click.IntRange(1),
            help="Tokens of one chain, markers included.",
        ),
        click.option(
            "--step-limit",
            multiple=True,
            metavar="N | STEP=N",
            help="Maximum text tokens of every step, or of one step; STEP=N may be repeated.",
        ),
        click.option("--sample", is_flag=True, help="Sample instead of taking the likeliest token."),
        click.option(
            "--temperature",
            default=1.0,
            show_default=True,
            type=click.FloatRange(0, min_open=True),
            help="With --sample.",
        ),
        click.option(
            "--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="With --sample."
        ),
        click.option("--seed", default=0, show_default=True, help="Seed of sampling."),
    )(function)


def json_option(what: str) -> Callable[[F], F]:
    """--json, with what it prints."""
    return click.option(
        "--json", "as_json", is_flag=True, help=f"{what} To pipe it, call axolotl-mote: axolotl prints a banner first."
    )


@contextmanager
def usage_errors(extra: str | None = None) -> Iterator[None]:
    """Turn errors of values and files, and missing packages of ``extra``, into one line on stderr, no traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        raise click.ClickException(
            f"{error}. Install the extra, in a clone of the project: pip install '.[{extra}]'"
        ) from error


def parse_limits(values: Sequence[str]) -> int | dict[str, int] | None:
    """``("64",)`` -> 64; ``("analysis=64", "guidance=32")`` -> one limit per name.

    Raises:
        ValueError: If a value is neither a number nor NAME=NUMBER, or both forms are mixed.
    """
    limits: dict[str, int] = {}
    for value in values:
        name, equals, number = value.rpartition("=")
        if not number.isdigit() or bool(equals) != bool(name) or (not name and len(values) > 1):
            raise ValueError(f"--step-limit must be N once, or STEP=N for each step; got {value!r}. Write analysis=64.")
        limits[name] = int(number)
    return limits.get("", limits or None)


def sampling_arguments(sample: bool, temperature: float, top_p: float, **_: Any) -> dict[str, Any]:
    """Arguments of ``model.generate`` for the sampling options.

    Raises:
        ValueError: If a sampling option is given without --sample.
    """
    if not sample:
        if temperature != 1.0 or top_p != 1.0:
            raise ValueError(
                f"--temperature and --top-p must come with --sample; got {temperature} and {top_p} without it. "
                "Add --sample."
            )
        return {}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
