"""Statistics as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from axolotl_mote.builder.output.statistics import WHOLE, StepNumbers, Summary
from axolotl_mote.builder.output.tables import count_groups, note, paper_numbers
from axolotl_mote.report import COLORS, Draw, Page, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_html(path: Path, summary: Summary, title: str) -> None:
    """Write the page. It holds numbers only, no text of any chain."""
    page = Page(f"{title}: {summary.chains} chains{note(summary)}")
    page.text(
        "Self-BLEU compares every text with all others by 4-grams; lower is more diverse. It grows with the number of "
        "texts, so compare sets of one size."
    )
    paper = paper_numbers(summary)
    if paper:
        page.text("The paper's columns are MoTE's Table 2 (6,000 chains, arXiv 2405.00557).")
    beside = ("paper: share", "paper: Self-BLEU") if paper else ()
    head = ("step", "chains", "share", "Self-BLEU", *beside, "words: mean", "median", "p95", "max")
    page.table(head, [_row(step, numbers, paper) for step, numbers in summary.steps.items()])
    page.heading("Lengths in words")
    page.plots(Plot(_name(step), _histogram(numbers)) for step, numbers in summary.steps.items() if numbers.count)
    for group, counts in count_groups(summary).items():
        if counts:
            page.counts(group.capitalize(), counts)
    page.write(path)


def _name(step: str) -> str:
    return "whole chain" if step == WHOLE else step


def _row(step: str, numbers: StepNumbers, paper: dict[str, tuple[float, float]]) -> list[str]:
    bleu = "-" if numbers.self_bleu is None else f"{numbers.self_bleu:.2f}"
    beside = [f"{paper[step][0]:.1f} %", f"{paper[step][1]:.2f}"] if paper else []
    words = [f"{numbers.words_mean:.0f}", f"{numbers.words_median:.0f}", str(numbers.words_p95), str(numbers.words_max)]
    return [_name(step), str(numbers.count), f"{100 * numbers.share:.1f} %", bleu, *beside, *words]


def _histogram(numbers: StepNumbers) -> Draw:
    def draw(axes: Axes) -> None:
        lows, highs, counts = zip(*numbers.histogram, strict=True)
        widths = [high + 1 - low for low, high in zip(lows, highs, strict=True)]
        axes.bar(lows, counts, width=widths, align="edge", color=COLORS[1], linewidth=0.5, edgecolor="white")
        axes.set(xlabel="words", ylabel="texts", xlim=(0, highs[-1] + 1))

    return draw
