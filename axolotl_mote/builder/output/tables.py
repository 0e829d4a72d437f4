"""Statistics as tables in the terminal, and the wording that tables and page share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl_mote.builder.output.statistics import WHOLE, Summary

if TYPE_CHECKING:
    from rich.console import Console

_PAPER = {  # MoTE, Table 2: share of chains in %, Self-BLEU
    "analysis": (71.5, 75.52),
    "guidance": (61.4, 74.34),
    "response": (100.0, 72.10),
    WHOLE: (100.0, 80.38),
}


def print_summary(summary: Summary, console: Console) -> None:
    """Print tables to a rich console.

    Args:
        summary: The statistics.
        console: One without markup, since reasons come from a file.
    """
    from rich.table import Table

    paper = paper_numbers(summary)
    # Two tables, to fit into 80 columns.
    amounts, lengths = Table(title=f"{summary.chains} chains{note(summary)}"), Table()
    columns = ("step", "chains", "share", "Self-BLEU", *(["in the paper"] if paper else []))
    for table, names in ((amounts, columns), (lengths, ("words", "mean", "median", "p95", "max"))):
        for column in names:
            table.add_column(column, justify="left" if column == names[0] else "right")
    for step, numbers in summary.steps.items():
        name = "whole chain" if step == WHOLE else step
        bleu = "-" if numbers.self_bleu is None else f"{numbers.self_bleu:.2f}"
        beside = [f"{paper[step][0]:.1f} %, {paper[step][1]:.2f}"] if paper else []
        amounts.add_row(name, str(numbers.count), f"{100 * numbers.share:.1f} %", bleu, *beside)
        middle = (f"{numbers.words_mean:.0f}", f"{numbers.words_median:.0f}")
        lengths.add_row(name, *middle, str(numbers.words_p95), str(numbers.words_max))
    console.print(amounts, lengths)
    for title, counts in count_groups(summary).items():
        if counts:
            group = Table(title, "number", "share")
            for name, count in counts.items():
                group.add_row(name, str(count), f"{100 * count / sum(counts.values()):.1f} %")
            console.print(group)


def count_groups(summary: Summary) -> dict[str, dict[str, int]]:
    """The counts of a summary by title."""
    return {
        "chain form": summary.forms,
        "check": summary.checks,
        "user turns": summary.turns,
        "rejected because": summary.rejected,
    }


def paper_numbers(summary: Summary) -> dict[str, tuple[float, float]]:
    """The paper's share in % and Self-BLEU by step; empty for chains of other steps."""
    return _PAPER if summary.steps.keys() == _PAPER.keys() else {}


def note(summary: Summary) -> str:
    """What follows the number of chains: rows left out, chains sampled."""
    refused = f", {summary.refused} refused row{'s' * (summary.refused > 1)} left out" if summary.refused else ""
    return refused + (f" (Self-BLEU of {summary.sampled} of them)" if summary.sampled else "")
