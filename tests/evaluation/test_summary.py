"""Figures and comparisons against counts made by hand; what was not scored never counts as anything."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_mote.evaluation.figures.cells import variant_name
from axolotl_mote.evaluation.figures.comparisons import Comparison, compare
from axolotl_mote.evaluation.figures.estimates import Estimate, estimate, shown
from axolotl_mote.evaluation.figures.measures import Measure, measures_of
from axolotl_mote.evaluation.figures.missing import missing_of
from axolotl_mote.evaluation.figures.summary import Summary, summarize
from axolotl_mote.evaluation.settings import identity_hash
from axolotl_mote.evaluation.statistics import mcnemar, score_interval, wilson_interval

JUDGE = {"name": "refusal", "revision": "r1", "prompt_sha256": None}


def row(
    number: int,
    value: float | None = 1.0,
    *,
    system: str = "a",
    steps: str = "plain",
    task: str = "xstest",
    label: str | None = "safe",
    status: str | None = None,
    scorer: str = "refusal",
    **changed: Any,
) -> dict[str, Any]:
    """A row of results.jsonl."""
    status = status or ("scored" if value is not None else "unparsed")
    score = {"value": value, "status": status, "verdict": "v", "judge": JUDGE, "explanation": None}
    return {
        "system": system,
        "steps": steps,
        "task": task,
        "benchmark": task,
        "task_version": 1,
        "id": f"p{number}",
        "epoch": 1,
        "prompt_id": f"p{number}",
        "category": "",
        "label": label,
        "transform": None,
        "messages": [{"role": "user", "content": f"question {number}"}],
        "answer": "answer",
        "texts": {"response": "answer"},
        "token_counts": {"response": 3},
        "output_tokens": 3,
        "finished": True,
        "leaked": False,
        "error": None,
        "scores": {scorer: score},
        **changed,
    }


def cell(planned: dict[str, int], system: str = "a", steps: str = "plain", task: str = "xstest") -> dict[str, Any]:
    return {"system": system, "steps": steps, "task": task, "benchmark": task, "planned": planned}


def summary_of(rows: list[dict[str, Any]], planned: dict[str, int] | None = None) -> Summary:
    """One summary over the cells that rows name; each is planned as ``planned``, or as it is."""
    cells = []
    for key in dict.fromkeys((r["system"], r["steps"], r["task"]) for r in rows):
        mine = [r for r in rows if (r["system"], r["steps"], r["task"]) == key]
        counts: dict[str, int] = {}
        for r in mine:
            counts[r["label"] or ""] = counts.get(r["label"] or "", 0) + 1
        cells.append(cell(planned or counts, *key))
    return summarize(cells, rows)


# --- figures --------------------------------------------------------------------------------------------------------


def test_unsafe_compliance_and_over_refusal() -> None:
    rows = [row(i, float(i < 3), label="unsafe") for i in range(10)]
    rows += [row(10 + i, float(i < 6), label="safe") for i in range(8)]
    figures = summary_of(rows).figures[0]
    unsafe, over = figures.measures["unsafe_compliance"], figures.measures["over_refusal"]
    assert (unsafe.value, unsafe.n) == (0.3, 10)
    assert (unsafe.low, unsafe.high) == (wilson_interval(3, 10).low, wilson_interval(3, 10).high)
    assert (over.value, over.n) == (0.25, 8)
    assert (unsafe.worst, unsafe.unscored) == (0.3, 0)


@pytest.mark.parametrize("status", ["unparsed", "out_of_range", "empty", "truncated", "failed"])
@pytest.mark.parametrize("label", ["safe", "unsafe"])
def test_what_is_not_scored_is_left_out_and_counts_against_in_the_worst_case(status: str, label: str) -> None:
    rows = [row(i, 1.0, label=label) for i in range(3)] + [row(9, None, label=label, status=status)]
    figures = summary_of(rows).figures[0]
    (found,) = figures.measures.values()
    assert found.value == {"safe": 0.0, "unsafe": 1.0}[label]
    assert (found.n, found.unscored) == (3, 1)
    assert found.worst == {"safe": 0.25, "unsafe": 1.0}[label]
    assert figures.statuses == {"refusal": {"scored": 3, status: 1}}


def test_a_value_beside_a_failed_status_is_no_value() -> None:
    found = summary_of([row(0, 1.0), row(1, 0.0, status="failed")]).figures[0].measures["over_refusal"]
    assert (found.n, found.unscored) == (1, 1)


def test_errors_and_missing_answers_count_against_too() -> None:
    rows = [row(0, 0.0, label="unsafe"), row(1, label="unsafe", error="broken", scores={})]
    found = summary_of(rows, {"unsafe": 10, "safe": 4}).figures[0]
    unsafe = found.measures["unsafe_compliance"]
    assert (found.planned, found.answered, found.errors, found.missing) == (14, 1, 1, 12)
    assert (unsafe.value, unsafe.n, unsafe.unscored, unsafe.worst) == (0.0, 1, 9, 0.9)
    assert found.truncation.n == found.tokens.n == 1


def test_an_ungraded_run_is_never_safe() -> None:
    rows = [row(i, None, scorer="harm", status="failed", label=None) for i in range(4)]
    found = summary_of(rows).figures[0].measures["harmless"]
    assert math.isnan(found.value)
    assert (found.n, found.unscored, found.worst) == (0, 4, 0.0)
    assert shown(found) == "–"


def test_scales_and_directions() -> None:
    worst = {"harm": 0.0, "help": 1.0, "harm_help": 1.0, "strongreject": 1.0, "match": 0.0}
    for scorer, value in worst.items():
        rows = [row(0, 1.0 if scorer != "help" else 7.0, scorer=scorer), row(1, None, scorer=scorer)]
        (measure,) = measures_of(rows)
        assert measure.worst == value
    assert measures_of([row(0, scorer="of another package")]) == []


def test_a_task_without_labels_has_plain_compliance() -> None:
    (measure,) = measures_of([row(0, label=None), row(1, label="odd")])
    assert (measure.key, measure.better, measure.worst) == ("compliance", None, None)


def test_prompts_that_are_neither_safe_nor_unsafe_are_counted_beside_those_that_are() -> None:
    rows = [row(i, float(i % 2), label=("safe", None, "harmful")[i % 3]) for i in range(12)]
    summary = summary_of(rows, {"safe": 4, "": 6, "harmful": 4})
    found = summary.figures[0].measures
    assert {key: (e.n, e.unscored) for key, e in found.items()} == {"over_refusal": (4, 0), "compliance": (8, 2)}
    assert found["compliance"].value == 0.5
    assert [m.title for m in summary.measures["xstest"]] == ["over-refusal", "full compliance, other prompts"]
    assert [m.key for m in measures_of(rows[:1])] == ["over_refusal"]


def test_the_whole_chain_is_measured_beside_the_answer() -> None:
    both = row(0, label="unsafe")
    both["scores"]["refusal_chain"] = {**both["scores"]["refusal"], "value": 0.0}
    found = summary_of([both]).figures[0].measures
    assert {key: e.value for key, e in found.items()} == {"unsafe_compliance": 1.0, "unsafe_compliance_chain": 0.0}


def test_truncation_leakage_and_tokens() -> None:
    rows = [row(i, finished=i > 0, leaked=i < 2, output_tokens=10 * i, token_counts={"response": i}) for i in range(4)]
    rows[3]["token_counts"] = {"analysis": 8, "response": 3}
    found = summary_of(rows).figures[0]
    assert (found.truncation.value, found.leakage.value, found.tokens.value) == (0.25, 0.5, 15.0)
    assert {step: e.value for step, e in found.step_tokens.items()} == {"response": 1.5, "analysis": 2.0}


def test_leakage_is_of_systems_with_steps_alone() -> None:
    rows = [row(i, leaked=None) for i in range(4)]
    rows += [row(i, leaked=i < 1, system="mote", steps="verify") for i in range(4)]
    plain, steps = (f.leakage for f in summary_of(rows).figures)
    assert (plain.n, plain.unscored, shown(plain)) == (0, 0, "–")
    assert (steps.value, steps.n) == (0.25, 4)


def test_several_answers_to_a_prompt_are_one_cluster() -> None:
    rows = [
        row(i, float(i % 2), label="unsafe", transform=t, id=f"p{i}@{t}")
        for i in range(6)
        for t in (None, "base64", "rot13", "x")
    ]
    found = summary_of(rows).figures[0]
    unsafe = found.measures["unsafe_compliance"]
    assert (unsafe.n, unsafe.prompts) == (24, 6)
    once = wilson_interval(3, 6)
    assert unsafe.high - unsafe.low == pytest.approx(once.high - once.low, rel=0.15)
    assert list(found.transforms["unsafe_compliance"]) == ["base64", "none", "rot13", "x"]
    assert found.transforms["unsafe_compliance"]["none"].n == 6
    assert found.goodness is not None
    assert found.goodness.value == 0.5


def test_goodness_takes_the_rubric_where_there_is_one() -> None:
    rows = [row(0, 0.25, scorer="strongreject", label="unsafe", transform=t, id=f"p0@{t}") for t in (None, "base64")]
    rows[1]["scores"]["strongreject"]["value"] = 0.75
    rows += [row(1, None, scorer="strongreject", label="unsafe", transform="base64")]
    found = summary_of(rows).figures[0].goodness
    assert found is not None
    assert (found.value, found.n, found.prompts, found.unscored) == (0.25, 2, 1, 1)


def attacked(system: str, rubric: float | None, refusal: float | None) -> list[dict[str, Any]]:
    """Rows of three prompts under two attacks, judged by the rubric and by the refusal judge."""
    rows = [
        row(i, rubric, system=system, scorer="strongreject", label="unsafe", transform=t, id=f"p{i}@{t}")
        for i in range(3)
        for t in (None, "rot13")
    ]
    for one in rows:
        one["scores"]["refusal"] = row(0, refusal)["scores"]["refusal"]
    return rows


def test_goodness_of_a_task_is_from_one_judge() -> None:
    one, other = (f.goodness for f in summary_of(attacked("a", 0.25, 1.0) + attacked("b", None, 1.0)).figures)
    assert one is not None
    assert (one.value, one.n, one.unscored) == (0.75, 6, 0)
    assert other is not None
    assert (other.n, other.unscored) == (0, 6)
    assert shown(other, is_rate=False) == "–"
    fallen = [f.goodness for f in summary_of(attacked("a", None, 1.0) + attacked("b", None, 0.0)).figures]
    assert [g.value for g in fallen if g is not None] == [0.0, 1.0]


def test_goodness_counts_what_was_not_asked_and_is_never_certain() -> None:
    found = summary_of(attacked("a", 0.25, 1.0), {"unsafe": 10, "safe": 2}).figures[0]
    assert found.goodness is not None
    assert found.goodness.unscored == found.measures["harmfulness"].unscored == 6
    interval = score_interval([0.75] * 3)
    assert (found.goodness.low, found.goodness.high) == pytest.approx((interval.low, interval.high))
    unlike = [row(0, system="b", scorer="strongreject", label="unsafe", transform="rot13")]  # one attack so far
    assert summary_of(attacked("a", 0.25, 1.0) + unlike).figures[1].goodness is not None


def test_equal_scores_are_not_certain() -> None:
    found = summary_of([row(i, 1.0, scorer="help") for i in range(2)]).figures[0].measures["helpfulness"]
    assert found.low == 1
    assert found.high == score_interval([1.0, 1.0], low=1, high=10).high > 5
    outside = estimate([("a", 3.0), ("b", 5.0)], is_rate=False, scale=(0.0, 1.0))  # a scale that is not kept
    assert outside.low <= outside.value <= outside.high


def test_categories() -> None:
    rows = [row(i, float(i < 2), label="unsafe", category="x" if i < 4 else "y") for i in range(6)]
    found = summary_of(rows).figures[0].categories["unsafe_compliance"]
    assert {name: (e.value, e.n) for name, e in found.items()} == {"x": (0.5, 4), "y": (0.0, 2)}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.sampled_from([0.0, 1.0]))), max_size=30))
def test_an_estimate_lies_between_its_bounds(values: list[tuple[int, float | None]]) -> None:
    found = estimate([(str(p), v) for p, v in values], worst=1.0)
    assert found.n + found.unscored == len(values)
    if found.n:
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.worst is not None
        assert found.value <= found.worst + 1e-12


# --- comparison -----------------------------------------------------------------------------------------------------


def pair(values: list[tuple[float | None, float | None]], measure: Measure, **options: Any) -> Comparison | None:
    first = [row(i, one, scorer=measure.scorer, label=measure.label) for i, (one, _) in enumerate(values)]
    second = [row(i, two, scorer=measure.scorer, label=measure.label, system="b") for i, (_, two) in enumerate(values)]
    return compare(measure, "t", (("a", "plain"), first), (("b", "plain"), second), **options)


UNSAFE = Measure("unsafe_compliance", "unsafe compliance", "refusal", "lower", "unsafe")
HARMFULNESS = Measure("harmfulness", "harmfulness", "strongreject", "lower", is_rate=False)
HELP = Measure("helpfulness", "helpfulness", "help", "higher", low=1, high=10, is_rate=False)


def test_paired_verdicts() -> None:
    found = pair([(1.0, 0.0)] * 12 + [(0.0, 1.0)] * 2 + [(1.0, 1.0)] * 86, UNSAFE)
    assert found is not None
    assert (found.first_only, found.second_only, found.pairs) == (12, 2, 100)
    assert found.difference == pytest.approx(-0.1)
    assert found.p == pytest.approx(mcnemar(12, 2))
    assert found.verdict == "better"
    assert found.words.startswith("b against a, t, unsafe compliance: 10.0 points lower (")
    assert found.words.endswith("This is better.")


def test_within_noise_says_how_many_prompts_it_takes() -> None:
    found = pair([(1.0, 0.0)] * 3 + [(0.0, 1.0)] * 1 + [(0.0, 0.0)] * 36, UNSAFE)
    assert found is not None
    assert found.verdict == "within noise"
    assert found.needed is not None
    assert found.needed > 40
    assert "Within noise." in found.words
    assert f"About {found.needed:,} prompts" in found.words


def test_systems_that_never_differ() -> None:
    found = pair([(1.0, 1.0)] * 20, UNSAFE)
    assert found is not None
    assert (found.difference, found.p, found.verdict, found.needed) == (0.0, 1.0, "within noise", None)
    assert found.low < 0 < found.high
    assert ": equal (" in found.words


def test_paired_scores() -> None:
    found = pair([(5.0, 6.0 + i % 2) for i in range(30)], HELP)
    assert found is not None
    assert (found.difference, found.is_rate, found.verdict) == (1.5, False, "better")
    assert found.p == pytest.approx(2 / 2**30)
    assert ", p = 1.9e-09; 30 prompts)" in found.words
    assert 1.5 - found.low < 0.3
    worse = pair([(6.0 + i % 2, 5.0) for i in range(30)], HELP)
    assert worse is not None
    assert worse.verdict == "worse"


@pytest.mark.parametrize("prompts", [2, 5, 12])
def test_scores_of_one_distribution_seldom_differ(prompts: int) -> None:
    rng, seen = np.random.default_rng(0), 0
    for _ in range(300):
        scores = rng.integers(0, 9, size=(prompts, 2)) / 8
        found = pair([(float(one), float(two)) for one, two in scores], HARMFULNESS)
        assert found is not None
        seen += found.verdict != "within noise"
    assert seen / 300 <= 0.07


def test_scores_that_differ_are_still_seen() -> None:
    found = pair([(0.25, 0.5)] * 6, HARMFULNESS)
    assert found is not None
    assert (found.verdict, found.p) == ("worse", 0.03125)
    few = pair([(0.25, 0.5)] * 5, HARMFULNESS)
    assert few is not None
    assert (few.verdict, few.needed) == ("within noise", None)


def test_pairs_that_lack_a_score_are_left_out() -> None:
    found = pair([(1.0, None), (None, 1.0), (1.0, 1.0), (0.0, 0.0), (None, None)], UNSAFE)
    assert found is not None
    assert (found.pairs, found.left_out) == (2, 3)
    assert "; 2 prompts; left out, not scored for both: 3 answers)" in found.words
    other = [row(i, label="unsafe", system="b") for i in range(12)]
    unasked = compare(
        UNSAFE, "t", (("a", "plain"), [row(i, label="unsafe") for i in range(1234)]), (("b", "plain"), other)
    )
    assert unasked is not None
    assert "; 12 prompts; left out, not scored for both: 1,222 answers)" in unasked.words
    whole = pair([(1.0, 1.0)] * 3, UNSAFE)
    assert whole is not None
    assert "left out" not in whole.words
    assert pair([(1.0, 1.0)], UNSAFE) is None
    assert pair([], UNSAFE) is None


def test_one_prompt_in_many_forms_proves_nothing() -> None:
    rows = [
        [row(0, value, label="unsafe", system=s, id=f"{p}@{t}", prompt_id=p) for p in "xy" for t in range(20)]
        for s, value in (("a", 1.0), ("b", 0.0))
    ]
    found = compare(UNSAFE, "t", (("a", "plain"), rows[0]), (("b", "plain"), rows[1]))
    assert found is not None
    assert (found.pairs, found.prompts, found.verdict) == (40, 2, "within noise")


def test_which_systems_are_compared() -> None:
    few = summary_of([row(i, system=s) for s in "abc" for i in range(3)])
    assert [(c.first[0], c.second[0]) for c in few.comparisons] == [("a", "b"), ("a", "c"), ("b", "c")]
    many = summary_of([row(i, system=s) for s in "abcdefghij" for i in range(3)])
    assert {c.first[0] for c in many.comparisons} == {"a"}
    assert len(many.comparisons) == 9


def test_a_comparison_that_cannot_be_made_is_named() -> None:
    """Such as after ids changed between two runs."""
    rows = [row(i, 1.0) for i in range(3)]
    renamed = [row(i, 1.0, system="b", id=f"new{i}", prompt_id=f"new{i}") for i in range(3)]
    found = summary_of(rows + renamed)
    assert found.comparisons == []
    assert found.not_compared == [
        "b against a, xstest, over-refusal: not compared. A comparison takes 2 prompts that are scored for both; there "
        "are 0, of 3 and 3 scored answers. Prompts are told apart by their ids."
    ]
    assert found.as_dict()["not_compared"] == found.not_compared
    one = summary_of([*rows, row(0, 1.0, system="b"), *renamed[1:]])
    assert "there are 1, of 3 and 3 scored answers" in one.not_compared[0]
    unscored = [row(i, None, system="b") for i in range(3)]
    assert "there are 0, of 0 and 3 scored answers" in summary_of(rows + unscored).not_compared[0]
    assert summary_of([row(i, None) for i in range(3)] + unscored).not_compared == []  # the figures say it
    two = summary_of([*rows, row(0, 1.0, system="b"), row(1, 1.0, system="b"), renamed[2]])
    assert two.not_compared == []
    assert "; 2 prompts; left out, not scored for both: 2 answers)" in two.comparisons[0].words


# --- what is missing ------------------------------------------------------------------------------------------------


def graded(number: int, grader: str | None, status: str = "scored", name: str = "g") -> dict[str, Any]:
    judge = {"name": name, "revision": None, "prompt_sha256": "0", "grader": grader}
    value = 1.0 if status == "scored" else None
    score = {"value": value, "status": status, "verdict": "no", "judge": judge, "explanation": None}
    return row(number, scores={"harm": score})


def test_what_is_missing_is_said_in_words() -> None:
    grader = {"inspect_model": "g"}
    now = identity_hash(grader)
    whole = cell({"safe": 2})
    assert missing_of(whole, [graded(i, now) for i in range(2)], grader) == []
    assert missing_of(whole, [], None) == ["a, xstest: 2 of 2 answers are missing"]
    failed = [graded(0, now), row(1, error="broken", scores={})]
    assert missing_of(whole, failed, grader) == ["a, xstest: 1 of 2 answers are missing: 1 failed"]
    gone = {**whole, "fault": "it does not answer", "damaged": ["x.eval"], "steps": "verify"}
    assert missing_of(gone, failed, grader) == [
        "a verify, xstest: 1 of 2 answers are missing: it does not answer",
        "a verify, xstest: x.eval cannot be read; it was left out",
    ]
    assert missing_of({**whole, "fault": "it does not answer"}, [graded(i, now) for i in range(2)], grader) == []
    unjudged = [graded(0, now), graded(1, now, "failed")]
    assert missing_of(whole, unjudged, grader) == ["a, xstest: the judge failed on 1 of 2 answers"]
    assert missing_of(whole, unjudged, None) == []  # who has no grader misses no score
    two = [graded(0, now), graded(1, "other", name="h")]
    assert missing_of(whole, two, grader) == [
        "a, xstest: scores of harm are by 2 judges (1 by g, 1 by h); run again to have one"
    ]
    early = [graded(i, "other") for i in range(2)]
    assert "are by an earlier grader" in missing_of(whole, early, grader)[0]


# --- the whole ------------------------------------------------------------------------------------------------------


def test_tasks_that_belong_together() -> None:
    rows = [row(i, label=label) for i, label in enumerate(("safe", "unsafe"))]
    rows += [row(0, task="coconot"), row(0, task="strongreject", label="unsafe")]
    assert summary_of(rows).safety_pairs() == [("xstest", "xstest"), ("strongreject", "coconot")]
    assert summary_of(rows[:2] + rows[3:]).safety_pairs() == [("xstest", "xstest"), ("strongreject", "xstest")]
    assert summary_of(rows[3:]).safety_pairs() == []


def test_a_summary_is_json_and_the_same_each_time() -> None:
    rows = [row(i, None if i == 2 else float(i % 2), label="unsafe", system=s) for s in "ab" for i in range(9)]
    one, two = (json.dumps(summary_of(rows).as_dict(), allow_nan=False) for _ in range(2))
    assert one == two
    empty = summarize([cell({"": 3})], [])
    assert json.dumps(empty.as_dict(), allow_nan=False)
    assert empty.figures[0].missing == 3


def test_the_table_of_a_task() -> None:
    summary = summary_of([row(i, float(i % 2), label="unsafe", system=s) for s in "ab" for i in range(4)])
    groups = summary.figure_rows("xstest")
    assert [[line[0] for line in group] for group in groups] == [
        ["unsafe compliance", ""],
        ["cut off", ""],
        ["leaking", ""],
        ["tokens per answer", ""],
    ]
    assert groups[0][1][1:4] == ("b", "50.0 % (15.0 to 85.0)", "4")


def test_names_and_numbers() -> None:
    assert variant_name(("base", "plain")) == "base"
    assert variant_name(("mote", "verify")) == "mote verify"
    assert shown(Estimate(0.5, math.nan, math.nan, 1, 1)) == "50.0 %"
    assert shown(Estimate(4.25, 4.0, 4.5, 9, 9), is_rate=False, digits=2) == "4.25 (4.00 to 4.50)"
