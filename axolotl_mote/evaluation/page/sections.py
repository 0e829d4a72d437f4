"""The page, section by section.

It knows the summary, the manifest and the rows; it computes no figure and writes no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from axolotl_mote.evaluation.figures.cells import variant_name
from axolotl_mote.evaluation.figures.estimates import Estimate, shown
from axolotl_mote.evaluation.figures.measures import Row
from axolotl_mote.evaluation.figures.summary import FIGURE_COLUMNS, Summary
from axolotl_mote.evaluation.page.answers import add_answers
from axolotl_mote.evaluation.page.plots import Variant, group_plot, scatter
from axolotl_mote.report import Page


def make_page(summary: Summary, manifest: Mapping[str, Any], rows: Sequence[Row]) -> Page:
    """The whole page."""
    page = Page("Evaluation")
    page.text(
        "Intervals are 95 %, clustered by prompt. Rates are taken over what was scored; the worst case counts all that "
        "was not scored against the system."
    )
    _add_systems(page, summary, manifest)
    _add_safety(page, summary)
    for task in summary.measures:
        _add_task(page, summary, task)
    _add_comparisons(page, summary)
    _add_sources(page, summary, manifest)
    add_answers(page, rows, len(summary.variants))
    return page


def _add_systems(page: Page, summary: Summary, manifest: Mapping[str, Any]) -> None:
    cells = manifest["cells"]
    page.table(("system", "model"), dict.fromkeys((c["system"], c["model"]) for c in cells), text_columns=[1])
    if summary.missing:
        page.heading("What is missing")
        page.text("Figures are of a part of the prompts, or there are none yet. Run the command again to go on.")
        page.table(("missing",), [(words,) for words in summary.missing])


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
        if (found := group_plot(measure, kind, cells, groups, summary.variants))
    ]
    page.plots(plots)
    steps = dict.fromkeys(step for f in cells for step in f.step_tokens)
    if steps:
        rows = [(variant_name(f.variant), *(_count(f.step_tokens.get(s)) for s in steps)) for f in cells]
        page.table(("tokens per answer", *steps), rows)


def _count(found: Estimate | None) -> str:
    return "" if found is None else shown(found, False)


def _add_comparisons(page: Page, summary: Summary) -> None:
    if not summary.comparisons and not summary.not_compared:
        return
    page.heading("Systems compared on the same prompts")
    for words in summary.not_compared:
        page.text(words)
    if not summary.comparisons:
        return
    count = len(summary.comparisons)
    page.text(
        "Verdicts are compared by McNemar's exact test, by prompts where a prompt has several answers; scores by a "
        "sign-flip test and a paired bootstrap, which must both see a difference. Answers that are not scored for both "
        f"are left out. Of {count} comparisons about {max(1, round(count / 20))} would look different by chance."
    )
    rows = []
    for c in summary.comparisons:
        scale, digits = (100, 1) if c.is_rate else (1, 2)
        gap = f"{c.difference * scale:+.{digits}f} ({c.low * scale:+.{digits}f} to {c.high * scale:+.{digits}f})"
        rows.append(
            (
                c.task,
                c.title,
                variant_name(c.second),
                variant_name(c.first),
                gap,
                f"{c.p:.2g}",
                c.verdict,
                c.prompts,
                c.left_out,
                "" if c.needed is None else f"{c.needed:,}",
                "" if c.needed_small is None else f"{c.needed_small:,}",
            )
        )
    head = ("task", "measure", "system", "against", "difference", "p", "verdict", "prompts", "left out")
    page.table((*head, "prompts to see it", "to see 5 points, or 5 % of the scale"), rows, text_columns=[1, 2, 3, 6])
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
