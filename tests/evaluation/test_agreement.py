"""Agreement with human labels, against counts made by hand and by brute force."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_mote.evaluation.agreement import (
    LABELS,
    SPELLINGS,
    Label,
    LabelledAnswer,
    labelled_answers,
    measure_agreement,
    read_labelled,
)


def answers(labels: list[Label], clusters: list[str] | None = None) -> list[LabelledAnswer]:
    clusters = clusters or [f"p{number}" for number in range(len(labels))]
    return [LabelledAnswer("q", "a", label, cluster) for label, cluster in zip(labels, clusters, strict=True)]


FULL, PARTIAL, REFUSAL = LABELS


def test_figures_by_hand() -> None:
    human: list[Label] = [FULL] * 5 + [PARTIAL] * 2 + [REFUSAL] * 3
    judge: list[Label] = [FULL, FULL, FULL, FULL, PARTIAL, REFUSAL, FULL, REFUSAL, REFUSAL, REFUSAL]
    found = measure_agreement(answers(human), judge)
    assert found.confusion.tolist() == [[4, 1, 0], [1, 0, 1], [0, 0, 3]]
    assert found.three_class == pytest.approx(0.7)
    assert found.binary == pytest.approx(0.8)
    assert found.kappa_binary == pytest.approx((0.8 - 0.5) / 0.5)  # both sides say full compliance 5 times
    assert found.f1 == pytest.approx({FULL: 0.8, PARTIAL: 0.0, REFUSAL: 6 / 7})


pairs = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, None])), max_size=30)


@settings(max_examples=50, deadline=None)
@given(pairs)
def test_rates_against_brute_force(drawn: list[tuple[Label, Label | None]]) -> None:
    verdicts = [verdict for _, verdict in drawn]
    found = measure_agreement(answers([label for label, _ in drawn]), verdicts, samples=5)
    scored = [(label, verdict) for label, verdict in drawn if verdict]
    assert found.n == len(scored)
    assert found.rows == len(drawn)
    assert sum(found.unscored.values()) == found.rows - found.n
    assert found.confusion.sum() == found.n
    if scored:
        assert found.three_class == pytest.approx(sum(a == b for a, b in scored) / found.n)
        assert found.binary == pytest.approx(sum((a == FULL) == (b == FULL) for a, b in scored) / found.n)
        assert found.three_class <= found.binary
        for name, value in (("agreement_binary", found.binary), ("agreement_three_class", found.three_class)):
            assert found.intervals[name].low - 1e-9 <= value <= found.intervals[name].high + 1e-9
    json.dumps(found.as_dict(), allow_nan=False)


def test_intervals_draw_prompts_not_answers() -> None:
    """Fifty answers to each of four prompts say little more than four answers."""
    labels: list[Label] = [FULL] * 200
    verdicts: list[Label | None] = [REFUSAL] * 50 + [FULL] * 150
    apart = measure_agreement(answers(labels), verdicts)
    together = measure_agreement(answers(labels, [f"p{n // 50}" for n in range(200)]), verdicts)
    assert apart.binary == together.binary

    def width(found: object) -> float:
        interval = found.intervals["agreement_binary"]  # type: ignore[attr-defined]
        return interval.high - interval.low

    assert width(together) > 3 * width(apart)


def test_unscored_answers_are_counted_and_in_no_rate() -> None:
    found = measure_agreement(
        answers([FULL, FULL, REFUSAL, FULL]), [FULL, None, REFUSAL, None], ["", "empty", "", "failed"]
    )
    data = found.as_dict()
    assert data["unscored"] == {"empty": 1, "failed": 1}
    assert data["agreement_binary"] == 1.0
    assert data["worst_case"]["agreement_binary"] == 0.5


def test_nothing_scored_gives_no_figure() -> None:
    found = measure_agreement(answers([FULL]), [None], ["empty"])
    assert math.isnan(found.binary)
    assert found.as_dict()["agreement_binary"] is None
    assert found.as_dict()["intervals"]["kappa"] == [None, None]


def test_numbers_must_match() -> None:
    with pytest.raises(ValueError, match="must be as many; got 1, 2 and 1"):
        measure_agreement(answers([FULL]), [FULL, FULL])


@pytest.mark.parametrize(("spelling", "label"), SPELLINGS.items())
def test_spellings(spelling: str, label: Label) -> None:
    (answer,) = labelled_answers([(1, {"prompt": "q", "completion": "a", "human_label": f" {spelling}"})], "rows")
    assert answer.label == label


def test_prompt_id_clusters_where_it_is_given() -> None:
    row = {"prompt": "q", "completion": "a", "human_label": FULL}
    found = labelled_answers([(1, row), (2, {**row, "prompt_id": 7}), (3, {**row, "prompt_id": None})], "rows")
    assert [answer.cluster for answer in found] == ["q", "7", "q"]


def test_all_faults_at_once_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "labelled.jsonl"
    good = {"prompt": "q", "completion": "", "human_label": FULL, "more": [1]}
    rows = [good, {"prompt": 3, "completion": "a", "human_label": "refusal"}, {"completion": None, "human_label": FULL}]
    file.write_bytes("".join(json.dumps(row) + "\n\n" for row in rows).encode() + b"{\n\xff\n[]\n")
    with pytest.raises(ValueError, match="7 faults") as error:
        read_labelled(file)
    text = str(error.value)
    for part in (
        "row 3: prompt must be a text; got int",
        "row 3: human_label must be one of",
        "row 5: prompt must be a text; got no such column",
        "row 5: completion must be a text; got NoneType",
        "row 7: the line must be JSON",
        "row 8: the line must be UTF-8",
        "row 9: the line must hold a JSON object",
    ):
        assert part in text
    assert text.count(str(file)) == 8
    assert "row 1" not in text


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_row_is_an_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match="got no row"):
        read_labelled(file)


def test_the_seed_is_fixed() -> None:
    rng = np.random.default_rng(1)
    human = [LABELS[n] for n in rng.integers(3, size=60)]
    judge: list[Label | None] = [LABELS[n] for n in rng.integers(3, size=60)]
    assert measure_agreement(answers(human), judge).as_dict() == measure_agreement(answers(human), judge).as_dict()
