"""The page: self-contained, escaped, bounded, and no label over another one."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from html_kit import TagReader

from axolotl_mote.evaluation.figures.estimates import Estimate
from axolotl_mote.evaluation.figures.summary import summarize
from axolotl_mote.evaluation.page import answers
from axolotl_mote.evaluation.page.files import read_report, write_report
from axolotl_mote.evaluation.page.plots import scatter
from axolotl_mote.evaluation.page.sections import make_page
from axolotl_mote.report import Page, Plot

HOSTILE = '</p></details><script>alert(1)</script><img src=x onerror=y> \u2028 \U0001f600 & "q"'


def rows_and_manifest(
    systems: list[tuple[str, str]],
    prompts: int = 6,
    text: str = HOSTILE,
    tasks: Sequence[str] = ("xstest", "strongreject", "coconot"),
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answers of systems to prompts of tasks, attacked ones among them."""
    all_labels = {"xstest": ("safe", "unsafe"), "strongreject": ("unsafe",), "coconot": ("safe",)}
    rows, cells = [], []
    for place, (system, steps) in enumerate(systems):
        for task in tasks:
            labels, mine = all_labels[task], []
            for number in range(prompts):
                for transform in (None, "base64") if task == "strongreject" else (None,):
                    value = float((number + place) % 3 == 0)
                    judge = {"name": text, "revision": "r", "prompt_sha256": "0" * 64}
                    score = {"value": value, "status": "scored", "verdict": text, "judge": judge, "explanation": text}
                    mine.append(
                        {
                            **{"system": system, "steps": steps, "task": task, "benchmark": task, "task_version": 1},
                            **{"id": f"p{number}@{transform}", "epoch": 1, "prompt_id": f"p{number}"},
                            "category": f"category {number % 3} with a name that is far too long for a narrow plot",
                            **{"label": labels[number % len(labels)], "transform": transform},
                            "messages": [{"role": "system", "content": text}, {"role": "user", "content": text}],
                            **{"answer": text, "texts": {"analysis": f"because {text}", "response": text}},
                            **{"token_counts": {"analysis": 9, "response": 5 + number}, "output_tokens": 14 + place},
                            **{"finished": number != 1, "leaked": False, "error": text if number == 2 else None},
                            "scores": {"refusal": score} | ({"strongreject": score} if task == "strongreject" else {}),
                        }
                    )
            planned = {label: sum(r["label"] == label for r in mine) for label in labels}
            cells.append(
                {
                    **{"system": system, "steps": steps, "task": task, "benchmark": task, "task_version": 1},
                    **{"model": text, "status": "partial", "planned": planned},
                    "data": {"source": text, "sha256": "0" * 64, "prompts": prompts, "subset": "all"},
                }
            )
            rows += mine
    return rows, {"cells": cells, "seed": 0, "versions": {"python": "3.11"}, "grader": None}


SYSTEMS = [("base", "plain"), ("mote", "adaptive"), ("mote", "analysis+guidance+response")]


def test_hostile_text_stays_text_and_nothing_is_loaded() -> None:
    rows, manifest = rows_and_manifest([("base", "plain"), ("mote", "adaptive")], 3, tasks=["strongreject"])
    for number, row in enumerate(rows):
        row["category"] = ("$\\nothing{$ <b>", "_hidden", "Ответ")[number % 3]
    markup = make_page(summarize(manifest["cells"], rows), manifest, rows).html()
    reader = TagReader()
    reader.feed(markup)
    assert reader.open == []
    assert not {"script", "img", "link", "iframe"} & set(reader.tags)
    assert {"svg", "details", "summary"} <= set(reader.tags)
    namespaces = set(re.findall(r'xmlns(?::\w+)?="([^"]*)"', markup))
    assert set(re.findall(r"(?:https?:|@import)[^\s\"<>]*", markup)) <= namespaces


@pytest.mark.parametrize(
    "odd",
    ["\u202eevil", "\u202d\u202aa", "\u2067b", "\u2069\u202e", "\u2069" * 9, "שלום", "a\u2029\u202eb", "\u202e" * 200],
)
def test_a_question_keeps_the_order_of_what_stands_beside_it(monkeypatch: pytest.MonkeyPatch, odd: str) -> None:
    """Question, category and error stand in lines that go on after them."""
    monkeypatch.setattr(Page, "plots", lambda self, plots: None)
    rows, manifest = rows_and_manifest([("base", "plain")], 3, text="plain words", tasks=["coconot"])
    for row in rows:
        row["messages"][-1]["content"] = row["category"] = odd
        row["error"] = row["error"] and odd
    markup = make_page(summarize(manifest["cells"], rows), manifest, rows).html()
    lines = re.findall("<(?:summary|b)>(.*?)</(?:summary|b)>", markup, re.DOTALL)
    assert sum(": refusal plain words" in line for line in lines) == 4
    assert sum("failed: " in line for line in lines) == 2
    for line in lines:
        outside, isolated = re.sub("\u2068[^\u2069]*\u2069", "", line), re.findall("\u2068([^\u2069]*)\u2069", line)
        assert not re.search("[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\u2029]", outside)
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u2029]", "".join(isolated))
    assert "\u202e" not in odd or any("[U+202E]" in line for line in lines)


def test_every_answer_stands_beside_its_verdict_until_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Page, "plots", lambda self, plots: None)
    rows, manifest = rows_and_manifest([("base", "plain")], prompts=40, text="plain words")
    for number, row in enumerate(rows):
        row["answer"] = f"answer-{number}."
    summary = summarize(manifest["cells"], rows)
    markup = make_page(summary, manifest, rows).html()
    assert all(f"<p>answer-{number}.</p>" in markup for number in range(len(rows)))
    assert "refusal plain words" in markup
    monkeypatch.setattr(answers, "MOST_ANSWERS", 30)
    monkeypatch.setattr(answers, "MOST_CHARACTERS", 5)
    capped = make_page(summary, manifest, rows).html()
    assert len(re.findall(r"<p>answe … \(\d+ more characters\)</p>", capped)) == 30
    assert "the first 10 are shown, results.jsonl holds all" in capped


def test_comparisons_say_what_they_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Page, "plots", lambda self, plots: None)
    rows, manifest = rows_and_manifest([("a", "plain"), ("b", "plain")], prompts=50, tasks=["coconot"])
    rows = [row for row in rows if row["system"] == "a" or int(row["prompt_id"][1:]) < 33]
    markup = make_page(summarize(manifest["cells"], rows), manifest, rows).html()
    found = re.search(r"<th[^>]*>prompts</th>\s*<th[^>]*>left out</th>", markup)
    assert found is not None
    assert re.search(r"<td[^>]*>32</td>\s*<td[^>]*>18</td>", markup)  # the answer to prompt 2 failed
    assert "; 32 prompts; left out, not scored for both: 18 answers)" in markup


def test_comparisons_that_cannot_be_made_are_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Page, "plots", lambda self, plots: None)
    rows, manifest = rows_and_manifest([("a", "plain"), ("b", "plain")], prompts=5, tasks=["coconot"])
    for row in rows:
        row["prompt_id"] = row["id"] = f"{row['system']} {row['id']}"
    summary = summarize(manifest["cells"], rows)
    (words,) = summary.not_compared
    assert f"<p>{words}</p>" in make_page(summary, manifest, rows).html()


def test_files_are_written_and_written_again_the_same(tmp_path: Path) -> None:
    rows, manifest = rows_and_manifest(SYSTEMS, 4, tasks=["xstest"])
    write_report(tmp_path, manifest, rows)
    first = {name: (tmp_path / name).read_bytes() for name in ("report.html", "summary.json")}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "results.jsonl").write_text(text, encoding="utf-8")
    read_report(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    assert json.loads(first["summary.json"])["comparisons"]


@pytest.mark.parametrize("manifest", [None, "{", "[]", "{}"])
def test_a_folder_without_results_is_refused(tmp_path: Path, manifest: str | None) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^output must hold manifest\.json and results\.jsonl"):
        read_report(tmp_path)


def test_a_run_without_answers_has_a_page() -> None:
    _, manifest = rows_and_manifest(SYSTEMS)
    markup = make_page(summarize(manifest["cells"], []), manifest, []).html()
    assert "What is missing" in markup
    assert "<td>mote adaptive, xstest: 6 of 6 answers are missing</td>" in markup


# --- plots ----------------------------------------------------------------------------------------------------------


def overlaps(plot: Any) -> list[tuple[str, str]]:
    """Texts of a plot that lie over each other or outside the picture."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn: dict[int, Text] = {}
    draw = Text.draw
    with matplotlib.rc_context({"font.size": 9}), pytest.MonkeyPatch.context() as patch:
        figure = Figure(figsize=(plot.width, plot.height), layout="constrained")
        plot.draw(figure.subplots())
        patch.setattr(Text, "draw", lambda text, *args: drawn.setdefault(id(text), text) and draw(text, *args))
        figure.savefig(io.BytesIO(), format="svg")  # ticks beyond the axes are not drawn
        boxes = [(t.get_text(), t.get_window_extent()) for t in drawn.values() if t.get_text().strip()]
    width, height = figure.bbox.width, figure.bbox.height
    found = [(text, "outside") for text, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1]
    for number, (text, box) in enumerate(boxes):
        for other, beside in boxes[number + 1 :]:
            x = min(box.x1, beside.x1) - max(box.x0, beside.x0)
            y = min(box.y1, beside.y1) - max(box.y0, beside.y0)
            if x > 1 and y > 1:
                found.append((text, other))
    return found


def test_the_search_for_overlaps_finds_them() -> None:
    def draw(axes: Any) -> None:
        axes.set_xlim(0, 1)
        axes.text(0.5, 0.5, "one")
        axes.text(0.51, 0.5, "two")
        axes.text(3, 0.5, "far away")

    found = overlaps(Plot("t", draw))
    assert ("one", "two") in found
    assert ("far away", "outside") in found


@pytest.mark.parametrize("count", [1, 4, 15])
def test_no_label_lies_over_another(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    modes = ["response", "analysis+response", "analysis+guidance+response", "adaptive", "verify"]
    systems = [(f"system-with-a-long-name-{i // 5}", modes[i % 5]) for i in range(count)]
    rows, manifest = rows_and_manifest(systems, prompts=6, text="x", tasks=("strongreject", "coconot"))
    drawn: list[Any] = []
    monkeypatch.setattr(Page, "plots", lambda self, plots: drawn.extend(plots))
    make_page(summarize(manifest["cells"], rows), manifest, rows)
    assert len(drawn) >= 8
    assert {plot.title: found for plot in drawn if (found := overlaps(plot))} == {}


def test_systems_at_one_place_are_drawn_apart_in_the_legend() -> None:
    point = Estimate(0.5, 0.4, 0.6, 9, 9)
    variants = [("a", "adaptive"), ("a", "verify"), ("b", "adaptive")]
    plot = scatter("t", [(v, point, point) for v in variants], ("x", "y"), (100, 100), variants, connect=True)
    svg = plot.svg()
    assert all(name in svg for name in ("a adaptive", "a verify", "b adaptive"))
    assert overlaps(plot) == []
