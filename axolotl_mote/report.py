"""One self-contained HTML page: text, tables and plots, in light and dark, without scripts or network.

The statistics of chain data, the quick start and the evaluation use it. Every string is escaped. matplotlib draws the
plots; it is imported when the first one is added.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from axolotl_mote.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#8c8c8c", "#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")
"""Readable on white and on black; the first is for the question, step k has color k."""

_INK = "#010203"  # stands for the page's own text color while matplotlib draws

_STYLE = """\
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; } td:not(.text, :first-child) { white-space: nowrap; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.bar { display: inline-block; height: .8em; background: #4477aa; } td.wide { width: 16rem; text-align: left; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
.tokens span { border-radius: .2rem; padding: .1rem 0; }
details { border-bottom: 1px solid var(--line); padding: .3rem 0; overflow-wrap: anywhere; }
details details { margin-left: 1rem; } summary { cursor: pointer; }
.passage { border-left: 3px solid var(--line); padding-left: .8rem; margin: .8rem 0; }
.passage p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; }
"""


def step_color(step_id: int) -> str:
    """The color of a step; 0 is the question."""
    return COLORS[0] if step_id == 0 else COLORS[1 + (step_id - 1) % (len(COLORS) - 1)]


Draw = Callable[["Axes"], None]


@dataclass(frozen=True)
class Plot:
    """A plot of a page.

    Args:
        title: What it shows.
        draw: Draws on a matplotlib ``Axes``.
        width, height: Size in inches.
    """

    title: str
    draw: Draw
    width: float = 5.0
    height: float = 2.6

    def svg(self) -> str:
        """The plot as SVG markup; text and axes take the color of the page."""
        import matplotlib
        from matplotlib.figure import Figure

        ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
        style = {
            **dict.fromkeys(ink, _INK),
            "svg.fonttype": "none",
            "svg.hashsalt": "axolotl_mote",
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "text.parse_math": False,  # a name may hold a dollar sign
        }
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(self.width, self.height), layout="constrained")
            self.draw(figure.subplots())
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        markup = buffer.getvalue()
        markup = re.sub(r"<metadata>.*?</metadata>", "", markup[markup.index("<svg") :], flags=re.DOTALL)
        label = f'<svg role="img" aria-label="{escape(self.title)}" '
        return markup.replace("<svg ", label, 1).replace(_INK, "currentColor")


class Page:
    """A page that is put together from top to bottom and then written.

    Args:
        title: Heading and title of the page.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]], text_columns: Iterable[int] = ()) -> None:
        """Add a table: the first column and ``text_columns`` are aligned left, all others right."""
        left = set(text_columns)

        def line(tag: str, cells: Sequence[object]) -> str:
            sides = (' class="text"' if number in left else "" for number in range(len(cells)))
            made = (f"<{tag}{side}>{escape(str(cell))}</{tag}>" for side, cell in zip(sides, cells, strict=True))
            return "<tr>" + "".join(made) + "</tr>"

        lines = [line("th", head), *(line("td", row) for row in rows)]
        self._parts.append("<table>\n" + "\n".join(lines) + "\n</table>")

    def counts(self, title: str, counts: dict[str, int]) -> None:
        """Add a section with a table of counts, their shares, and a bar for each."""
        total = sum(counts.values()) or 1
        self.heading(title)
        rows = []
        for name, count in counts.items():
            share = f"{100 * count / total:.1f}"
            bar = f'<td class="wide"><span class="bar" style="width: {share}%"></span></td>'
            rows.append(f"<tr><td>{escape(name)}</td><td>{count}</td><td>{share} %</td>{bar}</tr>")
        self._parts.append("<table>\n" + "\n".join(rows) + "\n</table>")

    def plots(self, plots: Iterable[Plot]) -> None:
        """Add plots side by side, as many as fit."""
        figures = [f"<figure><figcaption>{escape(p.title)}</figcaption>\n{p.svg()}</figure>" for p in plots]
        self._parts.append('<div class="plots">\n' + "\n".join(figures) + "\n</div>")

    @contextmanager
    def details(self, summary: str) -> Iterator[None]:
        """What is added in the block is folded away under a line of text; blocks may be nested."""
        self._parts.append(f"<details><summary>{escape(summary)}</summary>")
        yield
        self._parts.append("</details>")

    def passage(self, heading: str, text: str) -> None:
        """Add text as it was written, under a heading."""
        self._parts.append(f'<div class="passage"><b>{escape(heading)}</b><p>{escape(text)}</p></div>')

    def tokens(self, pieces: Iterable[tuple[int, str]], names: Sequence[str]) -> None:
        """Add text colored by step.

        Args:
            pieces: (step id, text) of consecutive stretches.
            names: Name by step id, the question first; they are the tooltips.
        """
        spans = [
            f'<span title="{escape(names[step])}" style="background: {step_color(step)}44">{escape(text)}</span>'
            for step, text in pieces
        ]
        self._parts.append('<p class="tokens">' + "".join(spans) + "</p>")

    def legend(self, names: Sequence[str]) -> None:
        """Add the colors of the steps; ``names`` as for ``tokens``."""
        self.tokens(((step, f" {name} ") for step, name in enumerate(names)), names)

    def html(self) -> str:
        """The whole page."""
        title = escape(self.title)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
            + "\n".join(self._parts)
            + "\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the page in one rename."""
        write_atomically(path, self.html())
