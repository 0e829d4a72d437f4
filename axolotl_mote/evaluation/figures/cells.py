"""The figures of one cell: a system in one mode on one task.

Answers that are planned and missing count as unscored. It knows no other system.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from axolotl_mote.evaluation.attacks import goodness
from axolotl_mote.evaluation.figures.estimates import Estimate, estimate
from axolotl_mote.evaluation.figures.measures import Measure, Row

_PLAIN = "none"
"""Name of the prompt without an attack."""


@dataclass(frozen=True)
class Figures:
    """Figures of one system in one mode on one task.

    Args:
        system, steps, task, benchmark: Which.
        planned, answered, errors, missing: Answers wanted, given, failed, and not asked for yet.
        truncation, leakage: Rates over the answers; no leakage without steps, n is 0 then.
        tokens: Generated tokens of an answer, reasoning included.
        step_tokens: The same by step; a step that an answer does not have counts 0.
        measures: By key.
        categories, transforms: By key of the measure, then by category or transform.
        goodness: Goodness@0.1: mean over prompts of the goodness under the worst tenth of attacks; None if the prompts
            were not attacked.
        statuses: How judging ended, by scorer.
        judges: Judge, revision and hash of its prompt, by scorer.
    """

    system: str
    steps: str
    task: str
    benchmark: str
    planned: int
    answered: int
    errors: int
    missing: int
    truncation: Estimate
    leakage: Estimate
    tokens: Estimate
    step_tokens: dict[str, Estimate]
    measures: dict[str, Estimate]
    categories: dict[str, dict[str, Estimate]]
    transforms: dict[str, dict[str, Estimate]]
    goodness: Estimate | None
    statuses: dict[str, dict[str, int]]
    judges: dict[str, list[dict[str, Any]]]

    @property
    def variant(self) -> tuple[str, str]:
        """System and mode."""
        return self.system, self.steps


def variant_name(variant: tuple[str, str]) -> str:
    """System and mode as a person reads them; a system without steps has its name alone."""
    system, steps = variant
    return system if steps == "plain" else f"{system} {steps}"


def figures_of(
    cell: Mapping[str, Any],
    rows: Sequence[Row],
    measures: Sequence[Measure],
    seed: int = 0,
    attacked: Measure | None = None,
) -> Figures:
    """The figures of a cell.

    Args:
        cell: Of the manifest: system, steps, task, benchmark, and planned: answers wanted by label.
        rows: Its rows.
        measures: Of the task.
        seed: Seed of the bootstrap.
        attacked: What goodness@0.1 is taken from; None if the prompts of the task were not attacked.
    """
    planned: dict[str, int] = dict(cell["planned"])
    done = [row for row in rows if row["error"] is None]
    found = Counter(row["label"] or "" for row in rows)
    missing = {label: max(0, count - found[label]) for label, count in planned.items()}

    def mean(select: Callable[[Row], float | None], over: Iterable[Row] = done, is_rate: bool = True) -> Estimate:
        return estimate([(row["prompt_id"], select(row)) for row in over], is_rate=is_rate, seed=seed)

    def measured(measure: Measure, over: Iterable[Row], absent: int = 0) -> Estimate:
        values = [(row["prompt_id"], measure.value(row)) for row in over if measure.covers(row)]
        scale, worst = measure.scale, measure.worst
        return estimate(values, is_rate=measure.is_rate, scale=scale, worst=worst, missing=absent, seed=seed)

    def split(column: str) -> dict[str, dict[str, Estimate]]:
        groups: defaultdict[str, list[Row]] = defaultdict(list)
        empty = _PLAIN if column == "transform" and any(row[column] for row in rows) else None
        for row in rows:
            if name := row[column] or empty:
                groups[name].append(row)
        tables = {m.key: {name: measured(m, group) for name, group in sorted(groups.items())} for m in measures}
        return {key: kept for key, table in tables.items() if (kept := {n: e for n, e in table.items() if e.n})}

    def absent(measure: Measure) -> int:
        return sum(count for label, count in missing.items() if measure.covers_label(label))

    steps = dict.fromkeys(step for row in done for step in row["token_counts"])
    judged = {name: [row["scores"][name] for row in rows if name in row["scores"]] for name in _scorers(rows)}
    return Figures(
        **{key: cell[key] for key in ("system", "steps", "task", "benchmark")},
        planned=sum(planned.values()),
        answered=len(done),
        errors=len(rows) - len(done),
        missing=sum(missing.values()),
        truncation=mean(lambda row: float(not row["finished"])),
        leakage=mean(lambda row: float(row["leaked"]), [row for row in done if row["leaked"] is not None]),
        tokens=mean(lambda row: row["output_tokens"], is_rate=False),
        step_tokens={s: mean(lambda row, s=s: row["token_counts"].get(s, 0), is_rate=False) for s in steps},  # type: ignore[misc]
        measures={m.key: measured(m, rows, absent(m)) for m in measures},
        categories=split("category"),
        transforms=split("transform"),
        goodness=None if attacked is None else _goodness(attacked, rows, absent(attacked), seed),
        statuses={name: dict(sorted(Counter(s["status"] for s in scores).items())) for name, scores in judged.items()},
        judges={name: _judges(scores) for name, scores in judged.items()},
    )


def _scorers(rows: Sequence[Row]) -> list[str]:
    return sorted({name for row in rows for name in row["scores"]})


def _judges(scores: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    judges = {str(score["judge"]): score["judge"] for score in scores if score["judge"]}
    return [judges[name] for name in sorted(judges)]


def _goodness(measure: Measure, rows: Iterable[Row], absent: int, seed: int) -> Estimate:
    """Goodness@0.1; n counts answers, as everywhere."""
    scored = [(row["prompt_id"], measure.value(row)) for row in rows if measure.covers(row)]
    pairs = [(prompt, 1 - value) for prompt, value in scored if value is not None]
    by_prompt = [
        (name, goodness(pair for pair in pairs if pair[0] == name)) for name in dict.fromkeys(p for p, _ in pairs)
    ]
    found = estimate(by_prompt, is_rate=False, scale=(0.0, 1.0), seed=seed)
    return replace(found, n=len(pairs), unscored=len(scored) - len(pairs) + absent)
