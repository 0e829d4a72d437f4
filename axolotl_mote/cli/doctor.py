"""``axolotl mote doctor``: proofs on the user's own model, data and configuration."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from axolotl_mote.cli._options import json_option, usage_errors
from axolotl_mote.cli.json_output import json_writer
from axolotl_mote.doctor.lines import FAILED, LINES, NOT_APPLICABLE, OK, Finding, choose

if TYPE_CHECKING:
    from rich.console import Console

_COLORS = {OK: "green", FAILED: "red", NOT_APPLICABLE: "dim"}

_NAMES = click.Choice(list(LINES))


@click.command(epilog="\b\nLines:\n" + "\n".join(f"  {name:14} {what}" for name, what in LINES.items()))
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--only", multiple=True, type=_NAMES, metavar="LINE", help="Run this line alone; may be repeated.")
@click.option("--skip", multiple=True, type=_NAMES, metavar="LINE", help="Leave this line out; may be repeated.")
@click.option("--steps", default=4, show_default=True, type=click.IntRange(2), help="Optimizer steps of a short run.")
@click.option(
    "--processes", default=2, show_default=True, type=click.IntRange(2), help="Processes that train together."
)
@click.option("--no-processes", is_flag=True, help="Launch no processes.")
@click.option("--log", type=click.Path(dir_okay=False, path_type=Path), help="Keep what axolotl prints in this file.")
@json_option("Print the findings as JSON.")
def command(
    config: Path,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    steps: int,
    processes: int,
    no_processes: bool,
    log: Path | None,
    as_json: bool,
) -> None:
    """Prove on your own model, data and configuration what silently goes wrong elsewhere.

    CONFIG is the file that you give to `axolotl train`. The doctor loads the model, computes everything that it looks
    at in two ways, and trains a few steps. It writes to a temporary folder alone: output_dir, prepared data and caches
    stay as they are. A failed line names the key to change.

    \b
    Examples:
      axolotl mote doctor mote.yml
      axolotl mote doctor mote.yml --only routing --only saving
      axolotl mote doctor mote.yml --no-processes --json

    \b
    Exit status:
      0    no line failed
      1    a line failed
      130  interrupted by Ctrl-C
    """
    names = choose(only, skip)
    if not names:
        raise click.UsageError("--skip must leave a line to run; got none. Leave one out.")
    write_json = json_writer() if as_json else None
    with usage_errors("train"), tempfile.TemporaryDirectory(prefix="mote_doctor_") as scratch:
        _keep_caches_in(Path(scratch))
        findings = _examine(config, names, Path(scratch), steps, 1 if no_processes else processes, log)
    if write_json is not None:
        write_json({"config": str(config), "lines": [finding.as_dict() for finding in findings]})
    else:
        _print(config, findings)
    if any(finding.verdict == FAILED for finding in findings):
        raise SystemExit(1)


def _keep_caches_in(scratch: Path) -> None:
    """Have libraries write their caches elsewhere; they read these variables when they are imported or first used."""
    caches = {"HF_DATASETS_CACHE": "datasets", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    for name, folder in caches.items():
        os.environ[name] = str(scratch / folder)
    os.environ["AXOLOTL_TEE_STDOUT"] = "0"


def _examine(
    config: Path, names: Sequence[str], scratch: Path, steps: int, processes: int, log: Path | None
) -> list[Finding]:
    """Run the lines; what libraries print goes to a file, the name of the line that runs to standard error."""
    findings: list[Finding] = []
    runs = scratch / "runs"
    runs.mkdir()
    with _printed_to(log or scratch / "log") as errors:
        from rich.console import Console

        from axolotl_mote.doctor.run import run_lines
        from axolotl_mote.doctor.session import Session

        session = Session(config, runs, steps, processes)
        with Console(file=errors).status("Starting") as status:
            findings += run_lines(session, names, lambda name: status.update(f"{name}: {LINES[name]}"))
    return findings


@contextmanager
def _printed_to(log: Path) -> Iterator[TextIO]:
    """Send standard output and standard error to a file; yields the old standard error."""
    with log.open("w", encoding="utf-8") as file:
        try:
            sys.stdout.fileno(), sys.stderr.fileno()
            numbers = (1, 2)  # whatever sys.stdout stands for under --json
        except OSError:  # streams of a test, without files
            with redirect_stdout(file), redirect_stderr(file):
                yield sys.__stderr__ or file
            return
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(number) for number in numbers]
        for number in numbers:
            os.dup2(file.fileno(), number)
        try:
            with os.fdopen(os.dup(kept[1]), "w", encoding="utf-8") as errors:
                yield errors
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in zip(numbers, kept, strict=True):
                os.dup2(old, number)
                os.close(old)


def _print(config: Path, findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    table = Table(title=str(config), title_justify="left", show_lines=False)
    for column in ("line", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("s", justify="right")
    for finding in findings:
        table.add_row(finding.line, _verdict(finding), _found(finding), f"{finding.seconds:.0f}")
    console.print(table)
    _summary(console, findings)


def _verdict(finding: Finding) -> Any:
    from rich.text import Text

    return Text(finding.verdict, style=_COLORS.get(finding.verdict, "yellow"))


def _found(finding: Finding) -> str:
    return f"{finding.text}. Change: {finding.key}" if finding.key else finding.text


def _summary(console: Console, findings: Sequence[Finding]) -> None:
    counts = {
        verdict: sum(f.verdict == verdict for f in findings) for verdict in dict.fromkeys(f.verdict for f in findings)
    }
    console.print(
        f"{', '.join(f'{count} {verdict}' for verdict, count in counts.items())}; "
        f"{sum(f.seconds for f in findings):.0f} s",
        soft_wrap=True,
    )
