"""The HTML page: self-contained, escaped, the same bytes each time."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from html_kit import TagReader

from axolotl_mote.report import Page, Plot, step_color

HOSTILE = '</title><script>alert(1)</script> & "quotes" \''


def page() -> Page:
    made = Page(HOSTILE)
    made.heading(HOSTILE)
    made.text(HOSTILE)
    made.table([HOSTILE, "n"], [[HOSTILE, 1]], text_columns=[0])
    made.counts(HOSTILE, {HOSTILE: 3, "other": 1})
    made.plots([Plot(HOSTILE, lambda axes: axes.plot([1, 2], [2, 1], label=HOSTILE) and axes.legend())])
    made.legend(["question", HOSTILE])
    made.tokens([(0, HOSTILE), (1, "x")], ["question", HOSTILE])
    return made


def test_foreign_text_never_becomes_markup() -> None:
    reader = TagReader()
    reader.feed(page().html())
    assert reader.open == []
    assert "script" not in reader.tags
    assert {"svg", "table", "figure"} <= set(reader.tags)


def test_nothing_is_loaded_from_elsewhere() -> None:
    markup = page().html()
    namespaces = set(re.findall(r'xmlns(?::\w+)?="([^"]*)"', markup))
    addresses = set(re.findall(r"(?:https?:|src\s*=|@import)[^\s\"<>]*", markup))
    assert addresses <= namespaces
    assert "color-scheme: light dark" in markup
    assert "currentColor" in markup


def test_a_page_is_reproducible_and_written_whole(tmp_path: Path) -> None:
    page().write(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page().html()


def test_a_plot_is_well_formed_svg() -> None:
    svg = Plot("t", lambda axes: axes.bar([1], [1], color=step_color(1))).svg()
    assert ElementTree.fromstring(svg).get("role") == "img"


def test_steps_have_colors_of_their_own() -> None:
    assert len({step_color(step) for step in range(7)}) == 7
    assert step_color(7) == step_color(1)
