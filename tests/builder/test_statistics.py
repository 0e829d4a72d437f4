"""Self-BLEU against nltk, and the numbers of a summary."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from builder_kit import write_rows
from rich.console import Console

from axolotl_mote.builder.output.report import write_html
from axolotl_mote.builder.output.selfbleu import self_bleu, tokenize
from axolotl_mote.builder.output.statistics import StepNumbers, Summary, read_chains, summarize
from axolotl_mote.builder.output.tables import print_summary


def random_texts(seed: int, count: int, longest: int, vocabulary: int) -> list[list[str]]:
    rng = random.Random(seed)
    return [[f"w{int(vocabulary * rng.random() ** 3)}" for _ in range(rng.randint(0, longest))] for _ in range(count)]


@pytest.mark.parametrize(
    ("seed", "count", "longest", "vocabulary"),
    [(0, 12, 40, 8), (1, 30, 6, 5), (2, 9, 60, 40), (3, 2, 5, 3), (4, 40, 30, 300)],
)
def test_self_bleu_is_nltks(seed: int, count: int, longest: int, vocabulary: int) -> None:
    bleu_score = pytest.importorskip("nltk.translate.bleu_score")
    texts = random_texts(seed, count, longest, vocabulary)
    smooth = bleu_score.SmoothingFunction().method1
    expected = [
        bleu_score.sentence_bleu(texts[:i] + texts[i + 1 :], text, smoothing_function=smooth) if text else 0.0
        for i, text in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(100 * sum(expected) / count, abs=1e-9)


def test_self_bleu_at_its_ends() -> None:
    same = [["the", "same", "text", "in", "every", "row"]] * 3
    assert self_bleu(same) == pytest.approx(100)
    assert self_bleu([["a", "b", "c", "d"], ["e", "f", "g", "h"]]) == 0
    assert self_bleu([["alone"]]) is None


def test_tokens() -> None:
    assert tokenize("Don't stop, 你好 world_1!") == ["Don", "'", "t", "stop", ",", "你", "好", "world_1", "!"]


def chains() -> list[dict[str, object]]:
    user = {"role": "user", "content": "q"}
    return [
        {"messages": [user], "analysis": None, "guidance": None, "response": "one two three", "check": "safe"},
        {
            "messages": [user, {"role": "assistant", "content": "a"}, user],
            "analysis": "four five",
            "guidance": None,
            "response": "six seven",
            "check": "safe",
        },
        {"messages": [user], "analysis": "four six", "guidance": "eight", "response": "nine ten", "check": None},
        {"messages": [user], "analysis": "other words here", "guidance": "more", "response": "end", "check": "safe"},
    ]


def test_summary() -> None:
    summary = summarize(chains(), [{"reason": "unsafe"}, {"reason": "unsafe"}, {"reason": "empty"}])
    assert {step: numbers.count for step, numbers in summary.steps.items()} == {
        "analysis": 3,
        "guidance": 2,
        "response": 4,
        "chain": 4,
    }
    assert summary.steps["analysis"].share == 0.75
    assert summary.steps["chain"].words_max == 5
    assert sum(number for *_, number in summary.steps["chain"].histogram) == 4
    assert summary.forms == {"analysis+guidance+response": 2, "analysis+response": 1, "response": 1}
    assert summary.checks == {"safe": 3, "none": 1}
    assert summary.turns == {"1": 3, "2": 1}
    assert summary.rejected == {"unsafe": 2, "empty": 1}


def test_sampling_is_seeded_and_only_for_self_bleu() -> None:
    rows = [{"messages": [], "response": " ".join(text)} for text in random_texts(5, 60, 30, 20)]
    a, b = summarize(rows, sample=20, seed=1), summarize(rows, sample=20, seed=1)
    assert a == b
    assert a.sampled == 20
    assert a.chains == 60
    assert a.steps["response"].self_bleu != summarize(rows).steps["response"].self_bleu


def test_the_page_holds_no_text_of_a_chain(tmp_path: Path) -> None:
    summary = summarize(chains(), [{"reason": "<script>alert(1)</script>"}])
    write_html(tmp_path / "s.html", summary, title="a<b>.jsonl")
    page = (tmp_path / "s.html").read_text()
    assert page.count("<svg") == 4
    assert "<script" not in page
    assert "a&lt;b&gt;.jsonl" in page
    assert "nine ten" not in page
    assert len(page) < 100_000


def test_tables_fit_into_80_columns() -> None:
    """Every row and every heading on one line, however large the set and its texts."""
    whole = StepNumbers(160_000, 1.0, 100.0, 12_345, 12_345, 23_456, 99_999, [])
    steps = dict.fromkeys(("analysis", "guidance", "response", "chain"), whole)
    summary = Summary(160_000, 1_000, 10_000, steps, {}, {}, {}, {})
    console = Console(width=80, file=io.StringIO(), markup=False)
    print_summary(summary, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert any("Self-BLEU" in line and "in the paper" in line for line in lines)
    assert any("whole chain" in line and "100.00" in line and "100.0 %, 80.38" in line for line in lines)
    assert any("whole chain" in line and "12345" in line and "99999" in line for line in lines)


def test_a_step_named_like_the_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="'chain'"):
        summarize([{"plan": "One.", "chain": "Two."}], steps=("plan", "chain"))


def test_a_row_with_an_answer_is_no_refused_one(tmp_path: Path) -> None:
    """A question's own column ``error`` stays in the row."""
    rows = read_chains(write_rows(tmp_path / "c.jsonl", [{"response": "Yes.", "error": "E42"}]))
    assert (summarize(rows).chains, summarize(rows).refused) == (1, 0)


def test_a_file_that_holds_no_chains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 1: response must be a string; got NoneType"):
        summarize(read_chains(write_rows(tmp_path / "c.jsonl", [{"messages": []}])))
    with pytest.raises(ValueError, match="at least one chain"):
        summarize(read_chains(write_rows(tmp_path / "c.jsonl", [])))
