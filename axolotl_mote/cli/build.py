"""``axolotl mote build``: write a chain data set."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from axolotl_mote.cli._options import usage_errors

if TYPE_CHECKING:
    from axolotl_mote.builder.run import BuildReport, Status

_LINE_EVERY = 10_000  # where there is no bar


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), help="Output folder; overrides the build file."
)
@click.option("--limit", type=click.IntRange(min=1), help="Use at most this many rows of each question source.")
@click.option(
    "--exclude",
    multiple=True,
    metavar="NAME|FILE",
    help="A benchmark (coconot, hh_rlhf, strongreject, xstest) or a file of evaluation prompts; questions that match "
    "or contain one are dropped. May be repeated.",
)
@click.option("--restart", is_flag=True, help="Put an existing journal aside and begin a new one.")
@click.option("--shard", metavar="I/N", help="Build this share of the questions, on one of N hosts; I counts from 1.")
@click.option("--merge", is_flag=True, help="Write one data set from the journals of all shards; calls no model.")
def command(**options: Any) -> None:
    """Write a chain data set: the model aligns itself on your questions.

    CONFIG is a build file; docs/build-reference.md explains every key. You can stop the command at any time and
    run it again: no work is lost and none is done twice.

    \b
    Examples:
      axolotl mote build example_configs/build_local.yml --exclude xstest --exclude mine.jsonl
      axolotl mote build build.yml --shard $SLURM_ARRAY_TASK_ID/8       in a job of --array=1-8
      axolotl mote build build.yml --merge                              after it

    \b
    Exit status:
      0    finished
      1    error
      3    stopped by the budget or because no server responds, or questions were postponed: run it again
      130  interrupted by Ctrl-C: run it again
    """
    try:
        with usage_errors(extra="build"):
            status = _build(**options)
    except KeyboardInterrupt:  # while questions are read or results written; the journal has all that was done
        click.echo("Interrupted. Run the same command again to continue.", err=True)
        status = 130
    if status:
        raise SystemExit(status)


def _build(
    config: Path,
    output: Path | None,
    limit: int | None,
    exclude: tuple[str, ...],
    restart: bool,
    shard: str | None,
    merge: bool,
) -> int:
    """The work of the command; returns the exit status."""
    if merge and shard is not None:
        raise ValueError("--merge must be given without --shard; got both. Leave one out.")
    from axolotl_mote.benchmarks.sources import BENCHMARKS
    from axolotl_mote.builder.clients.calls import FatalCallError
    from axolotl_mote.builder.run import build
    from axolotl_mote.builder.settings import QuestionSource, load_settings
    from axolotl_mote.builder.shards import Shard

    part = None if shard is None else Shard.parse(shard)
    settings = load_settings(config)
    changed: dict[str, object] = {}
    if output is not None:
        changed["output"] = output
    if limit is not None:
        changed["questions"] = [q.model_copy(update={"limit": limit}) for q in settings.questions]
    if exclude:
        further = [name if name in BENCHMARKS else QuestionSource(path=name) for name in exclude]
        changed["exclude"] = [*settings.exclude, *further]
    settings = settings.model_copy(update=changed)
    try:
        with _Progress() as progress:  # aiohttp and others are imported when they are first needed
            report = build(
                settings,
                restart=restart,
                shard=part,
                merge=merge,
                on_progress=progress.show,
                on_count=progress.show_count,
            )
    except FatalCallError as error:
        raise click.ClickException(str(error)) from error
    again = "Run the shards again, then --merge" if merge else "Run the same command again"
    _print_report(report, part.folder(settings.output) if part else settings.output, again)
    if report.stopped == "interrupted":
        return 130
    return 3 if report.counts["pending"] else 0


class _Progress:
    """A progress bar on stderr; a line at every tenth if stderr is not a terminal."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("questions"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("questions", total=None, note="")
        self._tenth = 0
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show_count(self, what: str, count: int) -> None:
        """Show how far a part without calls is, such as "rows read"; it can take minutes."""
        self._bar.update(self._task, note=f"{count:,} {what}")
        if self._bar.disable and count % _LINE_EVERY == 0:
            self._console.print(f"{count:,} {what}")

    def show(self, status: Status) -> None:
        """Update the bar."""
        note = f"{status.kept} kept, {status.rejected} rejected"
        if status.postponed:
            note += f", {status.postponed} postponed"
        if status.tokens:
            note += f", {status.tokens:,} tokens"
        self._bar.update(self._task, total=status.total, completed=status.done, note=note)
        tenth = 10 * status.done // status.total if status.total else 10
        if self._bar.disable and tenth > self._tenth:
            self._tenth = tenth
            self._console.print(f"{status.done}/{status.total} questions: {note}")


def _print_report(report: BuildReport, output: Path, again: str) -> None:
    from rich.console import Console
    from rich.table import Table

    # No markup: paths and reasons may contain square brackets.
    console, counts = Console(markup=False), report.counts
    table = Table("outcome", "number")
    table.add_row("questions", str(counts["questions"]))
    for name, number in counts["forms"].items():
        table.add_row(f"kept: {name}", str(number))
    for name, number in counts["reasons"].items():
        table.add_row(f"rejected: {name}", str(number))
    if counts["pending"]:
        table.add_row("pending", str(counts["pending"]))
    for name, number in counts["dropped"].items():
        table.add_row(f"input row dropped: {name}", str(number))
    console.print(table)
    if report.set_aside:
        console.print(f"Older files are now {', '.join(report.set_aside)}.", soft_wrap=True)
    console.print(
        f"{report.requests} requests, {report.tokens:,} tokens, {report.seconds:.0f} s in this run. "
        f"Written to {output}: chains.jsonl, rejected.jsonl, manifest.json"
        + (", statistics.html" if counts["kept"] else ""),
        soft_wrap=True,
    )
    if report.stopped or counts["pending"]:
        why = f"Stopped: {report.stopped}. " if report.stopped else ""
        console.print(f"{why}{again} to continue; {counts['pending']} questions are left.", soft_wrap=True)
