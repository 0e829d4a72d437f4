"""Shows a summary: as tables in the terminal and as one HTML page without scripts or network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl_mote.builder.output import write_atomically
from axolotl_mote.builder.statistics import WHOLE, Summary

_PAPER = {  # MoTE, Table 2: share of chains in %, Self-BLEU
    "analysis": (71.5, 75.52),
    "guidance": (61.4, 74.34),
    "response": (100.0, 72.10),
    WHOLE: (100.0, 80.38),
}


def print_summary(summary: Summary, console: Any) -> None:
    """Print tables to a rich console; one without markup, since reasons come from a file."""
    from rich.table import Table

    paper = _paper(summary)
    amounts, lengths = Table(title=f"{summary.chains} chains{_note(summary)}"), Table()  # two, to fit into 80 columns
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
    for title, counts in _groups(summary).items():
        if counts:
            group = Table(title, "number", "share")
            for name, count in counts.items():
                group.add_row(name, str(count), f"{100 * count / sum(counts.values()):.1f} %")
            console.print(group)


def write_html(path: Path, summary: Summary, title: str) -> None:
    """Write the page. It holds numbers only, no text of any chain."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("axolotl_mote.builder"), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    template = environment.get_template("statistics.html.jinja")
    page = template.render(s=summary, title=title, paper=_paper(summary), groups=_groups(summary), note=_note(summary))
    write_atomically(path, page)


def _groups(summary: Summary) -> dict[str, dict[str, int]]:
    return {
        "chain form": summary.forms,
        "check": summary.checks,
        "user turns": summary.turns,
        "rejected because": summary.rejected,
    }


def _paper(summary: Summary) -> dict[str, tuple[float, float]]:
    """The paper's numbers, for chains of its steps."""
    return _PAPER if summary.steps.keys() == _PAPER.keys() else {}


def _note(summary: Summary) -> str:
    refused = f", {summary.refused} refused row{'s' * (summary.refused > 1)} left out" if summary.refused else ""
    return refused + (f" (Self-BLEU of {summary.sampled} of them)" if summary.sampled else "")
