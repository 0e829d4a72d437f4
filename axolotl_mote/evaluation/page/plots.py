"""Figures as plots.

Plots have no labels at points, which could overlap: a color stands for a system, a marker for its mode, and the legend
below the axes names both. It draws what it is given and knows no page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from axolotl_mote.evaluation.figures.cells import Figures, variant_name
from axolotl_mote.evaluation.figures.estimates import Estimate
from axolotl_mote.evaluation.figures.measures import Measure
from axolotl_mote.report import COLORS, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Variant = tuple[str, str]
"""System and mode."""

_MARKERS = "osD^vPX*<>hp"
_NAME_LENGTH = 38
_DOT_INCHES = 0.17


def _looks(variants: Sequence[Variant]) -> dict[Variant, tuple[str, str]]:
    """Color and marker of each: a color per system, a marker per mode."""
    systems = list(dict.fromkeys(system for system, _ in variants))
    modes = list(dict.fromkeys(mode for _, mode in variants))
    return {
        (system, mode): (
            COLORS[systems.index(system) % len(COLORS)],
            _MARKERS[(modes.index(mode) + systems.index(system) // len(COLORS)) % len(_MARKERS)],
        )
        for system, mode in variants
    }


def _finite(*estimates: Estimate) -> bool:
    return all(e.n and math.isfinite(e.value) for e in estimates)


def _error(found: Estimate, scale: float) -> list[list[float]] | None:
    if math.isnan(found.low):
        return None
    return [[max(0.0, found.value - found.low) * scale], [max(0.0, found.high - found.value) * scale]]


def scatter(
    title: str,
    points: Sequence[tuple[Variant, Estimate, Estimate]],
    labels: tuple[str, str],
    scales: tuple[float, float],
    variants: Sequence[Variant],
    connect: bool = False,
) -> Plot:
    """Points with intervals in both directions.

    Args:
        title: Of the plot.
        points: System and mode, x, y.
        labels: Of the axes.
        scales: Factors of x and y.
        variants: All systems and modes, so that each looks the same in every plot.
        connect: Join the modes of a system by a line.
    """
    looks = _looks(variants)
    kept = [(variant, x, y) for variant, x, y in points if _finite(x, y)]

    def draw(axes: Axes) -> None:
        for system in dict.fromkeys(variant[0] for variant, _, _ in kept) if connect else ():
            path = sorted((x.value * scales[0], y.value * scales[1]) for v, x, y in kept if v[0] == system)
            color = next(looks[v][0] for v, _, _ in kept if v[0] == system)
            axes.plot([x for x, _ in path], [y for _, y in path], color=color, alpha=0.4, linewidth=1)
        for variant, x, y in kept:
            color, marker = looks[variant]
            axes.errorbar(
                x.value * scales[0],
                y.value * scales[1],
                xerr=_error(x, scales[0]),
                yerr=_error(y, scales[1]),
                color=color,
                marker=marker,
                markersize=6,
                elinewidth=0.7,
                alpha=0.9,
                linestyle="",
                label=_cut_name(variant_name(variant)),
            )
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.margins(0.08)
        _legend_below(axes, len(kept))

    return Plot(title, draw, height=3.0 + _DOT_INCHES * math.ceil(len(kept) / _columns(len(kept))))


def _columns(count: int) -> int:
    return 2 if count > 3 else 1


def _legend_below(axes: Axes, count: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure: Any = axes.figure
    figure.legend(handles, labels, loc="outside lower left", ncols=_columns(count), fontsize=8)


def _cut_name(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def group_plot(
    measure: Measure,
    kind: str,
    cells: Sequence[Figures],
    groups: Sequence[Mapping[str, Mapping[str, Estimate]]],
    variants: Sequence[Variant],
) -> Plot | None:
    """A figure by category or attack: one line of dots with intervals for each, systems below each other.

    Args:
        measure: What is shown.
        kind: category or attack.
        cells: The systems and modes of a task.
        groups: For each cell its estimates, by measure, then by category or attack.
        variants: All systems and modes, so that each looks the same in every plot.

    Returns:
        The plot; None if there are fewer than two groups.
    """
    tables = [(f.variant, found[measure.key]) for f, found in zip(cells, groups, strict=True) if measure.key in found]
    names = list(dict.fromkeys(name for _, table in tables for name in table))
    if len(names) < 2:
        return None
    looks, scale = _looks(variants), 100 if measure.is_rate else 1
    pitch = len(tables) + 1.0

    def draw(axes: Axes) -> None:
        for place, (variant, table) in enumerate(tables):
            color, marker = looks[variant]
            for row, name in enumerate(names):
                if name in table and _finite(table[name]):
                    found = table[name]
                    axes.errorbar(
                        found.value * scale,
                        row * pitch + place,
                        xerr=_error(found, scale),
                        color=color,
                        marker=marker,
                        markersize=4.5,
                        elinewidth=0.8,
                        linestyle="",
                        label=_cut_name(variant_name(variant)) if name == next(iter(table)) else None,
                    )
        axes.set_yticks([row * pitch + (len(tables) - 1) / 2 for row in range(len(names))], map(_cut_name, names))
        axes.set_ylim(len(names) * pitch - 0.5, -1)
        axes.set_xlabel(measure.title + (", %" if measure.is_rate else ""))
        _legend_below(axes, len(tables))

    height = (
        0.9
        + _DOT_INCHES * max(pitch * len(names), 1.3 * len(names))
        + _DOT_INCHES * len(tables) / _columns(len(tables))
    )
    return Plot(f"{measure.title} by {kind}", draw, height=height)
