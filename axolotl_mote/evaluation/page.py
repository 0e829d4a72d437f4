"""The figures as one HTML page, with every answer beside its verdict; and summary.json. No inspect_ai.

Plots have no labels at points, which could overlap: a color stands for a system, a marker for its mode, and the legend
below the axes names both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_mote.evaluation.summary import (
    FIGURE_COLUMNS,
    Estimate,
    Figures,
    Measure,
    Row,
    Summary,
    shown,
    summarize,
    variant_name,
)
from axolotl_mote.files import read_all_rows, write_atomically
from axolotl_mote.report import COLORS, Page, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Variant = tuple[str, str]

MOST_ANSWERS = 1500
"""Answers on the page; results.jsonl holds all of them."""

MOST_CHARACTERS = 4000
"""Of one text on the page."""

_MARKERS = "osD^vPX*<>hp"
_NAME_LENGTH = 38
_DOT_INCHES = 0.17


# --- the files ------------------------------------------------------------------------------------------------------


def write_report(output: Path, manifest: Mapping[str, Any], rows: Iterable[Row]) -> Summary:
    """Write summary.json and report.html.

    Args:
        output: Folder.
        manifest: As in manifest.json.
        rows: Of results.jsonl; read more than once.
    """
    kept = list(rows)
    details = {key: manifest[key] for key in ("grader", "seed", "versions") if key in manifest}
    summary = summarize(manifest["cells"], kept, seed=manifest["seed"], details=details)
    write_atomically(output / "summary.json", json.dumps(summary.as_dict(), indent=1, ensure_ascii=False) + "\n")
    make_page(summary, manifest, kept).write(output / "report.html")
    return summary


def read_report(output: Path) -> Summary:
    """Write summary.json and report.html anew from manifest.json and results.jsonl.

    Raises:
        ValueError: If the folder holds no results, or broken ones.
    """
    path = output / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        cells = manifest["cells"]
        rows = list(read_all_rows(output / "results.jsonl"))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"output must hold manifest.json and results.jsonl; got {error!r} at {output}. Run the evaluation first."
        ) from error
    known = {(cell["system"], cell["steps"], cell["task"]) for cell in cells}
    return write_report(output, manifest, [r for r in rows if (r["system"], r["steps"], r["task"]) in known])


# --- the page -------------------------------------------------------------------------------------------------------


def make_page(summary: Summary, manifest: Mapping[str, Any], rows: Sequence[Row]) -> Page:
    """The whole page."""
    page = Page("Evaluation")
    page.text(
        "Intervals are 95 %, clustered by prompt. Rates are taken over what was scored; the worst case counts all that "
        "was not scored against the system."
    )
    _add_systems(page, manifest)
    _add_safety(page, summary)
    for task in summary.measures:
        _add_task(page, summary, task)
    _add_comparisons(page, summary)
    _add_sources(page, summary, manifest)
    _add_answers(page, summary, rows)
    return page


def _add_systems(page: Page, manifest: Mapping[str, Any]) -> None:
    cells = manifest["cells"]
    page.table(("system", "model"), dict.fromkeys((c["system"], c["model"]) for c in cells), text_columns=[1])
    lacking = [cell for cell in cells if cell["status"] != "complete"]
    if lacking:
        page.heading("What is missing")
        page.text("These figures are of a part of the prompts, or there are none yet. Run the command again to go on.")
        page.table(
            ("system", "task", "answers"),
            [(variant_name((c["system"], c["steps"])), c["task"], c["status"]) for c in lacking],
            text_columns=[1, 2],
        )


def _add_safety(page: Page, summary: Summary) -> None:
    """Unsafe compliance against over-refusal."""
    plots, table = [], []
    for unsafe, safe in summary.safety_pairs():
        names = unsafe if unsafe == safe else f"{unsafe} against {safe}"
        points: list[tuple[Variant, Estimate, Estimate]] = []
        for variant in summary.variants:
            first, second = summary.at(variant, safe), summary.at(variant, unsafe)
            if first is None or second is None:
                continue
            x, y = first.measures["over_refusal"], second.measures["unsafe_compliance"]
            table.append((variant_name(variant), names, shown(y), shown(x), y.unscored, x.unscored))
            points.append((variant, x, y))
        if any(x.n and y.n for _, x, y in points):
            title = f"{names}: the lower left corner is best"
            axes = ("over-refusal on safe prompts, %", "unsafe compliance, %")
            plots.append(scatter(title, points, axes, (100, 100), summary.variants))
    if not table:
        return
    page.heading("Unsafe compliance and over-refusal")
    page.text("Of unsafe prompts the share with full compliance; of safe prompts the share without it.")
    page.plots(plots)
    head = ("system", "tasks", "unsafe compliance", "over-refusal", "unscored unsafe", "unscored safe")
    page.table(head, table, text_columns=[1])


def _add_task(page: Page, summary: Summary, task: str) -> None:
    measures = summary.measures[task]
    cells = [f for f in summary.figures if f.task == task]
    page.heading(task)
    page.table(FIGURE_COLUMNS, [row for rows in summary.figure_rows(task) for row in rows], text_columns=[1])
    lacking = [(variant_name(f.variant), f"{f.answered} of {f.planned}", f.errors, f.missing) for f in cells]
    if any(errors or missing for *_, errors, missing in lacking):
        page.table(("system", "answers", "failed", "not asked yet"), lacking)
    plots = []
    for measure in measures:
        points = [(f.variant, f.tokens, f.measures[measure.key]) for f in cells]
        if any(x.n and y.n for _, x, y in points):
            unit, scale = ("%", 100) if measure.is_rate else ("score", 1)
            axes = ("generated tokens per answer", f"{unit}, {measure.better} is better" if measure.better else unit)
            title = f"{measure.title} against generated tokens"
            plots.append(scatter(title, points, axes, (1, scale), summary.variants, connect=True))
    plots += [
        found
        for measure in measures
        for kind, groups in (("category", [f.categories for f in cells]), ("attack", [f.transforms for f in cells]))
        if (found := _group_plot(measure, kind, cells, groups, summary.variants))
    ]
    page.plots(plots)
    steps = dict.fromkeys(step for f in cells for step in f.step_tokens)
    if steps:
        rows = [(variant_name(f.variant), *(_count(f.step_tokens.get(s)) for s in steps)) for f in cells]
        page.table(("tokens per answer", *steps), rows)


def _count(found: Estimate | None) -> str:
    return "" if found is None else shown(found, False)


def _add_comparisons(page: Page, summary: Summary) -> None:
    if not summary.comparisons:
        return
    page.heading("Systems compared on the same prompts")
    count = len(summary.comparisons)
    page.text(
        "Verdicts are compared by McNemar's exact test, by prompts where a prompt has several answers; scores by a "
        f"paired bootstrap. Of {count} comparisons about {max(1, round(count / 20))} would look different by chance."
    )
    rows = []
    for c in summary.comparisons:
        scale, digits = (100, 1) if c.p is not None else (1, 2)
        gap = f"{c.difference * scale:+.{digits}f} ({c.low * scale:+.{digits}f} to {c.high * scale:+.{digits}f})"
        rows.append(
            (
                c.task,
                c.title,
                variant_name(c.second),
                variant_name(c.first),
                gap,
                "" if c.p is None else f"{c.p:.2g}",
                c.verdict,
                c.prompts,
                "" if c.needed is None else f"{c.needed:,}",
                "" if c.needed_small is None else f"{c.needed_small:,}",
            )
        )
    head = ("task", "measure", "system", "against", "difference", "p", "verdict", "prompts", "prompts to see it")
    page.table((*head, "to see 5 points, or 5 % of the scale"), rows, text_columns=[1, 2, 3, 6])
    with page.details("The same in words"):
        for c in summary.comparisons:
            page.text(c.words)


def _add_sources(page: Page, summary: Summary, manifest: Mapping[str, Any]) -> None:
    page.heading("Judges, data, versions")
    judges: dict[tuple[str, ...], None] = {}
    for f in summary.figures:
        for scorer, found in f.judges.items():
            for judge in found:
                name = [str(judge.get(key) or "–") for key in ("name", "revision", "prompt_sha256")]
                judges[(f.task, scorer, *name)] = None
    if judges:
        page.table(("task", "score", "judge", "revision", "SHA-256 of its prompt"), judges, text_columns=range(1, 5))
    not_scored = [
        (variant_name(f.variant), f.task, scorer, status, count)
        for f in summary.figures
        for scorer, counts in f.statuses.items()
        for status, count in counts.items()
        if status != "scored"
    ]
    if not_scored:
        page.table(("system", "task", "score", "not scored because", "answers"), not_scored, text_columns=[1, 2, 3])
    data = {c["task"]: c for c in manifest["cells"]}
    page.table(
        ("task", "version", "prompts", "source", "SHA-256 of the prompts"),
        [
            (name, c["task_version"], c["data"].get("prompts"), c["data"].get("source"), c["data"].get("sha256"))
            for name, c in data.items()
        ],
        text_columns=[3, 4],
    )
    page.text(", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()))


def _add_answers(page: Page, summary: Summary, rows: Sequence[Row]) -> None:
    page.heading("Answers")
    by_task: dict[str, dict[tuple[str, int], list[Row]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], {}).setdefault((row["id"], row["epoch"]), []).append(row)
    per_task = max(1, MOST_ANSWERS // max(1, len(by_task)) // max(1, len(summary.variants)))
    for task, prompts in by_task.items():
        left_out = len(prompts) - per_task
        note = f"; the first {per_task} are shown, results.jsonl holds all" if left_out > 0 else ""
        with page.details(f"{task}: {len(prompts)} prompts{note}"):
            for answers in list(prompts.values())[:per_task]:
                _add_prompt(page, answers)


def _add_prompt(page: Page, answers: Sequence[Row]) -> None:
    first = answers[0]
    question = first["messages"][-1]["content"] if first["messages"] else ""
    about = ", ".join(str(first[key]) for key in ("label", "category", "transform") if first[key])
    verdicts = "; ".join(f"{variant_name((r['system'], r['steps']))}: {_verdict(r)}" for r in answers)
    with page.details(f"{_cut(' '.join(question.split()), 110)} – {verdicts}"):
        for message in first["messages"]:
            page.passage(f"{message['role']}{f' ({about})' if about else ''}", _cut(message["content"]))
        for row in answers:
            page.passage(f"{variant_name((row['system'], row['steps']))}: {_verdict(row)}", _cut(row["answer"] or ""))
            further = {name: text for name, text in row["texts"].items() if text != row["answer"]}
            judged = {n: s["explanation"] for n, s in row["scores"].items() if s["explanation"]}
            if further or judged:
                with page.details("steps before the answer, and what the judge wrote" if judged else "steps before it"):
                    for name, text in further.items():
                        page.passage(name, _cut(text))
                    for name, text in judged.items():
                        page.passage(f"judge of {name}", _cut(text))


def _verdict(row: Row) -> str:
    if row["error"] is not None:
        return f"failed: {_cut(row['error'], 200)}"
    parts = []
    for name, score in row["scores"].items():
        said = score["verdict"] if score["status"] == "scored" else f"not scored, {score['status']}"
        parts.append(f"{name} {said if said is not None else score['value']}".replace("_", " "))
    return ", ".join([*parts, *(["cut off"] if row["finished"] is False else [])]) or "not judged"


def _cut(text: str, most: int | None = None) -> str:
    most = MOST_CHARACTERS if most is None else most
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


# --- plots ----------------------------------------------------------------------------------------------------------


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


def _group_plot(
    measure: Measure,
    kind: str,
    cells: Sequence[Figures],
    groups: Sequence[Mapping[str, Mapping[str, Estimate]]],
    variants: Sequence[Variant],
) -> Plot | None:
    """A figure by category or attack: one line of dots with intervals for each, systems below each other."""
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
