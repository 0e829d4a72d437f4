"""Tables and the plot of a results file of ``run``, as Markdown on standard output.

    python tests/ablations/table.py docs/results/ablations.jsonl --svg docs/images/ablations.svg > tables.md

Of runs of the same row, seed and data the last line counts. Intervals are 95 %: over seeds Student's, or Wilson's over
all answers, on each side whichever is wider; the questions are the same for every row and seed. Rows that were not
trained on the same tokens in the same order are named.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from lookup import LEVELS
from rows import ROWS, TUNED

from axolotl_mote.evaluation.statistics import Interval, wilson_interval
from axolotl_mote.files import read_all_rows, write_atomically
from axolotl_mote.report import COLORS, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODES = ("adaptive", "response", "analysis+response", "analysis+guidance+response")
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantiles of Student's distribution by degrees of freedom."""

Line = dict[str, Any]


def latest(lines: Iterable[Line], data: str) -> dict[str, list[Line]]:
    """The lines of a data set by row, in the order of the table, one for each seed."""
    found: dict[tuple[str, int], Line] = {(line["row"], line["seed"]): line for line in lines if line["data"] == data}
    names = [name for name in ROWS if any(row == name for row, _ in found)]
    return {name: [line for (row, _), line in sorted(found.items()) if row == name] for name in names}


def interval(cells: Sequence[tuple[int, int]]) -> Interval:
    """Interval of a rate that every seed measured: hits and trials of each."""
    pooled = wilson_interval(sum(right for right, _ in cells), sum(n for _, n in cells))
    rates = [right / n for right, n in cells]
    if len(rates) < 2:
        return pooled
    half = STUDENT.get(len(rates) - 1, 2.262) * stdev(rates) / len(rates) ** 0.5
    return Interval(
        max(0.0, min(pooled.low, mean(rates) - half)),
        min(1.0, max(pooled.high, mean(rates) + half)),
    )


def cells(lines: Sequence[Line], mode: str, level: str) -> list[tuple[int, int]]:
    """Hits and trials of every seed that answered in this mode."""
    found = [line["answers"][mode][level] for line in lines if level in line["answers"].get(mode, {})]
    return [(cell["right"], cell["n"]) for cell in found]


def tokens(lines: Sequence[Line], mode: str, level: str) -> float:
    """Mean tokens of a chain over seeds."""
    return mean(line["answers"][mode][level]["tokens"] for line in lines if level in line["answers"].get(mode, {}))


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column aligned left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_table(rows: dict[str, list[Line]], mode: str) -> str:
    """Accuracy and tokens by row and level, in one mode."""
    body = []
    for name, lines in rows.items():
        if not cells(lines, mode, next(iter(LEVELS))):
            continue
        line = [f"`{name}`", str(len(lines)), str(sum(n for _, n in cells(lines, mode, next(iter(LEVELS)))))]
        for level in LEVELS:
            found = cells(lines, mode, level)
            bounds = interval(found)
            rate = mean(right / n for right, n in found)
            line.append(
                f"{100 * rate:.1f} ({100 * bounds.low:.0f}–{100 * bounds.high:.0f}), {tokens(lines, mode, level):.0f}"
            )
        body.append(line)
    return markdown(["row", "seeds", "answers", *LEVELS], body)


def loss_table(rows: dict[str, list[Line]]) -> str:
    """Held-out loss per token after training, by row and step: mean over seeds, least and most."""
    steps = ["all", "analysis", "guidance", "response"]
    body = []
    for name, lines in rows.items():
        measured = [[training["heldout"][-1] for training in line["trainings"]] for line in lines if line["trainings"]]
        if any(len(trainings) != 1 for trainings in measured) or not measured:
            continue  # separate models have a loss each
        line = [f"`{name}`", str(lines[0]["learning_rate"]), str(lines[0]["rank"])]
        for step in steps:
            values = [trainings[0][step] for trainings in measured if step in trainings[0]]
            line.append(f"{mean(values):.3f} ({min(values):.3f}–{max(values):.3f})" if values else "")
        body.append(line)
    return markdown(["row", "learning rate", "rank of an expert", *steps], body)


def judged_table(rows: dict[str, list[Line]], mode: str) -> str:
    """Full compliance with safe and unsafe prompts by the refusal judge, over all seeds, in one mode."""
    body = []
    for name, lines in rows.items():
        found = [line["answers"][mode] for line in lines if mode in line["answers"]]
        if not found:
            continue
        line = [f"`{name}`", str(len(found))]
        for kind in ("safe", "unsafe"):
            counts = sum((Counter(one[kind]) for one in found), Counter[str]())
            cut, full = counts.pop("cut off", 0), counts["full_compliance"]
            bounds = wilson_interval(full, counts.total())
            line.append(f"{full} of {counts.total()} ({100 * bounds.low:.0f}–{100 * bounds.high:.0f} %), {cut} cut off")
        body.append(line)
    return markdown(["row", "seeds", "safe prompts", "unsafe prompts"], body)


def tuning_table(lines: Iterable[Line]) -> str:
    """Held-out loss on the tuning rows by kind of adapter and learning rate."""
    losses = {
        (line["row"], line["learning_rate"]): line["trainings"][0]["heldout"][-1]["all"]
        for line in lines
        if line["data"] == "tuning"
    }
    rates = sorted({rate for _, rate in losses})
    body = [
        [kind, *(f"{losses[row, rate]:.4f}" if (row, rate) in losses else "" for rate in rates)]
        for kind, row in TUNED.items()
        if any(name == row for name, _ in losses)
    ]
    return markdown(["kind", *map(str, rates)], body) if body else ""


def unequal(rows: dict[str, list[Line]]) -> list[str]:
    """Seeds whose rows were not trained on the same tokens in the same order."""
    orders: dict[int, dict[str, set[str]]] = {}
    for name, lines in rows.items():
        for line in lines:
            if ROWS[name].answers == "all":
                for training in line["trainings"]:
                    orders.setdefault(line["seed"], {}).setdefault(training["order"], set()).add(name)
    return [
        f"seed {seed}: {' / '.join(', '.join(sorted(names)) for names in kinds.values())}"
        for seed, kinds in sorted(orders.items())
        if len(kinds) > 1
    ]


def draw(rows: dict[str, list[Line]]) -> Plot:
    """Accuracy against tokens, a panel for each level: fixed forms joined by a line, the adaptive mode as a star."""

    def on(axes: Axes) -> None:
        figure = axes.figure
        axes.remove()
        panels = figure.subplots(1, len(LEVELS), sharey=True)
        for panel, level in zip(panels, LEVELS, strict=True):
            panel.set_title(level, fontsize=9)
            panel.set_xlabel("tokens")
            panel.set_ylim(-0.03, 1.03)
            for number, (name, lines) in enumerate(rows.items()):
                _curve(panel, name, lines, level, COLORS[number % len(COLORS)])
        panels[0].set_ylabel("exact match")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)

    return Plot("Accuracy against generated tokens, by level", on, 10.0, 3.4)


def _curve(panel: Axes, name: str, lines: Sequence[Line], level: str, color: str) -> None:
    points = []
    for mode in MODES:
        found = cells(lines, mode, level)
        if not found:
            continue
        rate, bounds = mean(right / n for right, n in found), interval(found)
        error = [[max(0.0, rate - bounds.low)], [max(0.0, bounds.high - rate)]]
        point = (tokens(lines, mode, level), rate)
        if mode == MODES[0]:
            panel.errorbar(*point, yerr=error, color=color, marker="*", markersize=8, elinewidth=0.7)
        else:
            panel.errorbar(*point, yerr=error, color=color, marker="o", markersize=3, elinewidth=0.7)
            points.append(point)
    if points:
        panel.plot(*zip(*sorted(points), strict=True), color=color, linewidth=1, label=name)


def svg(plot: Plot) -> str:
    """The plot as a file of its own, on white."""
    markup = plot.svg()
    style = 'style="color: #222; background: #fff" '
    space = "" if "xmlns=" in markup[: markup.index(">")] else 'xmlns="http://www.w3.org/2000/svg" '
    return markup.replace("<svg ", f"<svg {space}{style}", 1) + "\n"


def parts(lines: list[Line]) -> Iterator[str]:
    """The page, piece by piece."""
    if tuned := tuning_table(lines):
        yield f"Held-out loss on the tuning rows, by learning rate\n\n{tuned}\n"
    for data, title in (("lookup", "Variable look-up"), ("safety", "Safety chains")):
        rows = latest(lines, data)
        if not rows:
            continue
        yield f"## {title}\n"
        first = next(iter(rows.values()))[0]
        size = f"{first['steps']} steps of {first['batch']} rows"
        yield f"{size}, {first['machine']['cpu']}, one thread.\n"
        for mode in MODES:
            if any(cells(of, mode, level) for of in rows.values() for level in LEVELS):
                yield f"`{mode}`: exact match in % (95 % interval), mean tokens of a chain\n"
                yield accuracy_table(rows, mode) + "\n"
            elif data == "safety" and any(mode in line["answers"] for of in rows.values() for line in of):
                yield f"`{mode}`: answers that comply in full, by the refusal judge\n"
                yield judged_table(rows, mode) + "\n"
        yield "Held-out loss per token after training (least and most over seeds)\n"
        yield loss_table(rows) + "\n"
        for line in unequal(rows):
            yield f"Not trained on the same tokens in the same order: {line}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; write the plot if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--svg", type=Path, help="where to write the plot of the look-up task")
    options = parser.parse_args(argv)
    lines = list(read_all_rows(options.results))
    print("\n".join(parts(lines)))
    rows = {name: of for name, of in latest(lines, "lookup").items() if any(line["answers"] for line in of)}
    if options.svg and rows:
        write_atomically(options.svg, svg(draw(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
