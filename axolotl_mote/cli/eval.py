"""``axolotl mote eval``: measure systems on benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_mote.cli._options import json_option, usage_errors
from axolotl_mote.cli.json_output import json_writer

if TYPE_CHECKING:
    from rich.console import Console

    from axolotl_mote.evaluation.figures.summary import Summary
    from axolotl_mote.evaluation.running.costs import Cost


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), help="Output folder; overrides the evaluation file."
)
@click.option("--limit", type=click.IntRange(min=1), help="Use at most this many prompts of each task.")
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and stop.")
@click.option("--report-only", is_flag=True, help="Write the report anew from results.jsonl; needs no inspect_ai.")
@json_option("Print the summary, or the cost, as JSON.")
def command(
    config: Path, output: Path | None, limit: int | None, dry_run: bool, report_only: bool, as_json: bool
) -> None:
    """Measure systems on benchmarks: safety, over-refusal, tokens; compared on the same prompts.

    CONFIG is an evaluation file. You can stop the command at any time, also by kill -9, and run it again: no answer is
    lost, and only those in flight are generated twice.

    \b
    Examples:
      axolotl mote eval example_configs/eval.yml --dry-run
      axolotl mote eval example_configs/eval.yml --limit 50

    \b
    Exit status:
      0    finished
      1    error
      3    answers or scores are missing because a server or a prompt failed: run it again;
           also with --report-only, which says what the last run lacked
      130  interrupted by Ctrl-C: run it again
    """
    if dry_run and report_only:
        raise click.UsageError("--dry-run must go without --report-only; got both. Give one.")
    write_json = json_writer() if as_json else None
    with usage_errors(extra="eval"):
        from axolotl_mote.evaluation.settings import load_settings

        settings = load_settings(config)
        if output is not None:
            settings = settings.model_copy(update={"output": output})
        if limit is not None:
            tasks = [t.model_copy(update={"limit": min(limit, t.limit or limit)}) for t in settings.tasks]
            settings = settings.model_copy(update={"tasks": tasks})
        status = _dry_run(settings, write_json) if dry_run else _evaluate(settings, report_only, write_json)
    if status:
        raise SystemExit(status)


def _dry_run(settings: Any, write_json: Any) -> int:
    from dataclasses import asdict

    from axolotl_mote.evaluation.running.costs import costs

    found = costs(settings)
    if write_json is not None:
        total = {key: sum(getattr(c, key) for c in found) for key in ("answers", "judge_calls", "most_tokens")}
        write_json({"cells": [asdict(c) for c in found], "total": total})
    else:
        from rich.console import Console

        _print_costs(found, Console(markup=False))
    return 0


def _evaluate(settings: Any, report_only: bool, write_json: Any) -> int:
    """The work of the command; returns the exit status."""
    if report_only:
        from axolotl_mote.evaluation.page.files import read_report

        summary, interrupted = read_report(settings.output), False
    else:
        from axolotl_mote.evaluation.run import run

        shows = write_json is None and sys.stdout.isatty()
        report = run(settings, tell=lambda line: click.echo(line, err=True), display="rich" if shows else "none")
        summary, interrupted = report.summary, report.interrupted
    status = 130 if interrupted else 3 if summary.missing else 0
    if write_json is not None:
        write_json(summary.as_dict())
        return status
    from rich.console import Console

    console = Console(markup=False)
    print_summary(summary, console)
    for fault in summary.missing:
        console.print(f"Missing: {fault}", soft_wrap=True)
    files = "summary.json, report.html" if report_only else "results.jsonl, summary.json, report.html"
    console.print(f"Written to {settings.output}: {files}", soft_wrap=True)
    if status:
        again = "Run it without --report-only" if report_only else "Run the same command again"
        console.print(f"{again} to continue.")
    return status


# --- tables ---------------------------------------------------------------------------------------------------------


def print_summary(summary: Summary, console: Console) -> None:
    """Print a table for every task, and the comparisons in words, those too that cannot be made."""
    from rich.table import Table

    from axolotl_mote.evaluation.figures.summary import FIGURE_COLUMNS

    for task in summary.measures:
        table = Table(title=task, title_justify="left")
        for place, column in enumerate(FIGURE_COLUMNS):
            table.add_column(column, justify="left" if place < 2 else "right", overflow="fold")
        for rows in summary.figure_rows(task):
            for row in rows:
                table.add_row(*row)
            table.add_section()
        console.print(table)
    for comparison in summary.comparisons:
        console.print(comparison.words, soft_wrap=True)
    for words in summary.not_compared:
        console.print(words, soft_wrap=True)


def _print_costs(costs: Sequence[Cost], console: Console) -> None:
    from rich.table import Table

    table = Table("cell", title="What is left to do", title_justify="left")
    for column in ("prompts", "answers", "judged", "tokens in", "tokens out", "at most", "time"):
        table.add_column(column, justify="right")
    for c in costs:
        numbers = (c.prompts, c.answers, c.judge_calls, c.prompt_tokens, c.tokens, c.most_tokens)
        table.add_row(c.name, *("unknown" if n is None else f"{n:,}" for n in numbers), _time(c.seconds))
    known = [c.seconds for c in costs if c.seconds is not None]
    total = (
        sum(c.prompts for c in costs),
        sum(c.answers for c in costs),
        sum(c.judge_calls for c in costs),
        sum(c.prompt_tokens for c in costs),
        sum(c.tokens or 0 for c in costs),
        sum(c.most_tokens for c in costs),
    )
    table.add_section()
    table.add_row("all", *(f"{n:,}" for n in total), _time(sum(known)) if len(known) == len(costs) else "unknown")
    console.print(table)
    console.print(
        "Answers to generate, calls of the grader, tokens. Tokens in are estimated from characters; tokens out and "
        "time come from earlier answers.",
        soft_wrap=True,
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
