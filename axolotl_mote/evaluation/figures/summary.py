"""All figures and comparisons of an evaluation, as tables and as JSON.

It takes the cells of the manifest and the rows of results.jsonl, and reads or writes no file.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, product
from typing import Any

from axolotl_mote.evaluation.figures.cells import Figures, figures_of, variant_name
from axolotl_mote.evaluation.figures.comparisons import Comparison, compare, not_compared
from axolotl_mote.evaluation.figures.estimates import Estimate, shown, shown_worst
from axolotl_mote.evaluation.figures.measures import Measure, Row, goodness_measure, measures_of
from axolotl_mote.evaluation.figures.missing import missing_of

_ALL_PAIRS = 8
"""Up to this many systems and modes are compared each with each; of more, each with the first."""


@dataclass(frozen=True)
class Summary:
    """Everything that the table and the page show.

    Args:
        figures: Of every cell, in the order of the evaluation file.
        measures: Of every task.
        comparisons: Of systems and modes on the same prompts.
        not_compared: Comparisons that cannot be made, in words.
        missing: Answers and scores that are missing, in words.
        details: What else summary.json holds.
    """

    figures: list[Figures]
    measures: dict[str, list[Measure]]
    comparisons: list[Comparison]
    not_compared: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def variants(self) -> list[tuple[str, str]]:
        """Systems and modes, in order."""
        return list(dict.fromkeys(f.variant for f in self.figures))

    def at(self, variant: tuple[str, str], task: str) -> Figures | None:
        """The figures of a system and mode on a task."""
        return next((f for f in self.figures if f.variant == variant and f.task == task), None)

    def figure_rows(self, task: str) -> list[list[tuple[str, ...]]]:
        """The table of a task, figure by figure: the lines of its systems; see ``FIGURE_COLUMNS``."""
        cells = [figures for figures in self.figures if figures.task == task]
        groups: list[tuple[str, Measure | None, Callable[[Figures], Estimate | None]]] = [
            (m.title, m, lambda cell, key=m.key: cell.measures[key])  # type: ignore[misc]
            for m in self.measures[task]
        ]
        if any(cell.goodness for cell in cells):
            groups.append(("goodness@0.1", _GOODNESS, lambda cell: cell.goodness))
        groups.append(("cut off", None, lambda cell: cell.truncation))
        groups.append(("leaking", None, lambda cell: cell.leakage))
        groups.append(("tokens per answer", _TOKENS, lambda cell: cell.tokens))
        table: list[list[tuple[str, ...]]] = []
        for title, measure, of in groups:
            found = [(variant_name(cell.variant), of(cell)) for cell in cells]
            lines = [(name, *_shown_row(measure, estimate)) for name, estimate in found if estimate is not None]
            table.append([(title if place == 0 else "", *line) for place, line in enumerate(lines)])
        return table

    def safety_pairs(self) -> list[tuple[str, str]]:
        """(task of unsafe compliance, task of over-refusal) that belong together.

        A task with both labels goes with itself; one with unsafe prompts alone with coconot, else with any that has
        safe ones.
        """
        has = {key: [t for t, ms in self.measures.items() if any(m.key == key for m in ms)] for key in _PAIR}
        unsafe, safe = (has[key] for key in _PAIR)
        benchmark = {f.task: f.benchmark for f in self.figures}
        ranked = sorted(safe, key=lambda task: benchmark[task] != "coconot")
        return [(task, task if task in safe else ranked[0]) for task in unsafe if ranked]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data; NaN becomes None."""
        values = {
            **self.details,
            "figures": [asdict(f) for f in self.figures],
            "measures": {task: [asdict(m) for m in measures] for task, measures in self.measures.items()},
            "pairs": [{"unsafe_compliance": unsafe, "over_refusal": safe} for unsafe, safe in self.safety_pairs()],
            "comparisons": [asdict(c) for c in self.comparisons],
            "not_compared": self.not_compared,
            "missing": self.missing,
        }
        plain: dict[str, Any] = _without_nan(values)
        return plain


FIGURE_COLUMNS = ("figure", "system", "value (95 %)", "scored", "unscored", "worst case")

_GOODNESS = Measure("goodness", "goodness@0.1", "", is_rate=False)
_TOKENS = Measure("tokens", "tokens per answer", "", is_rate=False)


def _shown_row(measure: Measure | None, found: Estimate) -> tuple[str, str, str, str]:
    if measure is None:  # a share that needs no judge
        return shown(found), str(found.n), "", ""
    digits = 2 if not measure.is_rate and measure is not _TOKENS else 1
    return shown(found, measure.is_rate, digits), str(found.n), str(found.unscored), shown_worst(measure, found)


_PAIR = ("unsafe_compliance", "over_refusal")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summarize(
    cells: Sequence[Mapping[str, Any]],
    rows: Iterable[Row],
    *,
    seed: int = 0,
    details: Mapping[str, Any] | None = None,
    faults: Sequence[str] = (),
) -> Summary:
    """All figures and comparisons.

    Args:
        cells: Of the manifest, in order; see ``figures_of`` and ``missing_of``.
        rows: Of results.jsonl.
        seed: Seed of the bootstrap.
        details: What else summary.json holds; under ``grader`` the grader's identity.
        faults: What is missing from more than one cell, in words.
    """
    by_cell: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        by_cell[row["system"], row["steps"], row["task"]].append(row)
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    variants = list(dict.fromkeys((cell["system"], cell["steps"]) for cell in cells))
    by_task = {task: [row for variant in variants for row in by_cell[*variant, task]] for task in tasks}
    measures = {task: measures_of(found) for task, found in by_task.items()}
    attacked = {task: goodness_measure(found) for task, found in by_task.items()}
    grader = (details or {}).get("grader")
    figures, missing = [], list(faults)
    for cell in cells:
        task, mine = cell["task"], by_cell[cell["system"], cell["steps"], cell["task"]]
        figures.append(figures_of(cell, mine, measures[task], seed, attacked[task]))
        missing += missing_of(cell, mine, grader)
    pairs = list(combinations(variants, 2)) if len(variants) <= _ALL_PAIRS else [(variants[0], v) for v in variants[1:]]
    comparisons, without = [], []
    for task, of_task in measures.items():
        for measure, (one, two) in product(of_task, pairs):
            first, second = (one, by_cell[*one, task]), (two, by_cell[*two, task])
            if found := compare(measure, task, first, second, seed):
                comparisons.append(found)
            elif why := not_compared(measure, task, first, second):
                without.append(why)
    return Summary(figures, measures, comparisons, without, missing, dict(details or {}))
