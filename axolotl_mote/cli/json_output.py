"""``--json``: standard output holds JSON and nothing else; whatever is printed besides goes to standard error.

One thing is out of reach: ``axolotl`` prints its banner on standard output, and flushes it, before it imports any code
of ours. ``axolotl-mote`` prints none. Upstream: axolotl/cli/main.py, ``cli``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

import click

from axolotl_mote.files import json_line


def json_writer() -> Callable[[dict[str, Any]], None]:
    """Keep standard output for JSON until the command ends.

    Returns:
        Writes one object as a line of JSON. Any other output, of libraries and child processes too, goes to standard
        error.
    """
    out = click.get_current_context().with_resource(_reserved_stdout())

    def write(value: dict[str, Any]) -> None:
        out.write(json_line(value).decode())
        out.flush()

    return write


@contextmanager
def _reserved_stdout() -> Iterator[TextIO]:
    out = sys.stdout
    try:
        number, errors = out.fileno(), sys.stderr.fileno()
    except OSError:  # a stream of a test, without a file
        with redirect_stdout(sys.stderr):
            yield out
        return
    if "axolotl.cli.main" in sys.modules and not out.isatty():
        click.echo("axolotl has printed its banner above the JSON. Call `axolotl-mote` to get JSON alone.", err=True)
    kept = os.dup(number)
    os.dup2(errors, number)
    try:
        out.flush()  # what was printed before
        with (
            os.fdopen(os.dup(kept), "w", encoding="utf-8") as file,
            redirect_stdout(sys.stderr),
        ):
            yield file
    finally:
        out.flush()
        os.dup2(kept, number)
        os.close(kept)
