"""Logs of inspect_ai to rows: the columns, their order, and what must never become a number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentReasoning,
    ContentText,
    ModelOutput,
    ModelUsage,
    get_model,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer
from inspect_ai.solver import TaskState, generate

from axolotl_mote.evaluation.results import Cell, answered_count, read_rows, without_secrets

COLUMNS = {
    *("system", "steps", "task", "benchmark", "task_version", "id", "epoch", "prompt_id", "category", "label"),
    *("transform", "messages", "answer", "texts", "token_counts", "output_tokens", "finished", "leaked", "error"),
    "scores",
}
MOTE = {
    "texts": {"analysis": "It is a game.", "response": "Press start."},
    "token_counts": {"analysis": 7, "response": 5},
    "finished": True,
    "check": None,
}


def output(text: str, *, stop: Any = "stop", metadata: Any = None, reasoning: str | None = None) -> ModelOutput:
    parts: list[Any] = [ContentReasoning(reasoning=reasoning)] if reasoning else []
    message = ChatMessageAssistant(content=[*parts, ContentText(text=text)], source="generate")
    return ModelOutput(
        model="m",
        choices=[ChatCompletionChoice(message=message, stop_reason=stop)],
        usage=ModelUsage(input_tokens=3, output_tokens=12, total_tokens=15, reasoning_tokens=7 if reasoning else None),
        metadata=metadata,
    )


@scorer(metrics=[mean()], name="refusal")
def given(values: dict[str, Any]) -> Scorer:
    """Scores by sample id."""

    async def score(state: TaskState, target: Target) -> Score:
        value = values.get(str(state.sample_id), (1.0, {"status": "scored", "verdict": "full_compliance"}))
        if isinstance(value, Exception):
            raise value
        return Score(value=value[0], metadata=value[1], explanation="because")

    return score


def rows_of(
    tmp_path: Path,
    outputs: list[ModelOutput | Exception],
    values: dict[str, Any] | None = None,
    samples: list[Sample] | None = None,
    secrets: dict[str, str] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """The rows of a run in which sample i gets output i."""

    def reply(messages: Any, *_: Any) -> ModelOutput:
        found = outputs[int(messages[-1].text.split()[-1])]
        if isinstance(found, Exception):
            raise found
        return found

    dataset = samples or [Sample(id=f"s{i}", input=f"question {i}", metadata={}) for i in range(len(outputs))]
    task = Task(dataset=dataset, solver=generate(), scorer=given(values or {}), name="t", metadata={"task_version": 4})
    inspect_eval(
        task,
        model=get_model("mockllm/model", custom_outputs=reply),
        log_dir=str(tmp_path),
        display="none",
        fail_on_error=False,
        log_realtime=False,
        ctl_server=False,
        **options,
    )
    (log,) = tmp_path.glob("*.eval")
    return list(read_rows(Cell("sys", "adaptive", "label", "t", log, ("refusal",)), secrets))


def test_a_row_of_a_chain(tmp_path: Path) -> None:
    metadata = {"category": "games", "label": "safe", "transform": "base64", "prompt_id": "s", "question": "q"}
    sample = Sample(
        id="s@base64",
        input=[ChatMessageSystem(content="Be kind."), ChatMessageUser(content="question 0")],
        metadata=metadata,
    )
    answer = output("Press start.", metadata={"mote": MOTE}, reasoning="It is a game.")
    (row,) = rows_of(tmp_path, [answer], samples=[sample])
    assert set(row) == COLUMNS
    assert row["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "question 0"},
    ]
    named = {key: row[key] for key in ("system", "steps", "task", "benchmark", "task_version", "id", "prompt_id")}
    assert list(named.values()) == ["sys", "adaptive", "label", "t", 4, "s@base64", "s"]
    assert (row["category"], row["label"], row["transform"]) == ("games", "safe", "base64")
    assert (row["answer"], row["texts"], row["token_counts"]) == ("Press start.", MOTE["texts"], MOTE["token_counts"])
    assert (row["output_tokens"], row["finished"], row["leaked"], row["error"]) == (12, True, False, None)
    assert row["scores"]["refusal"] == {
        "value": 1.0,
        "status": "scored",
        "verdict": "full_compliance",
        "judge": None,
        "explanation": "because",
    }


def test_a_system_without_steps(tmp_path: Path) -> None:
    plain, thinking = rows_of(tmp_path, [output("Yes."), output("Yes.", reasoning="Let me think.")])
    assert (plain["texts"], plain["token_counts"]) == ({"response": "Yes."}, {"response": 12})
    assert thinking["texts"] == {"reasoning": "Let me think.", "response": "Yes."}
    assert thinking["token_counts"] == {"reasoning": 7, "response": 5}
    assert (plain["prompt_id"], plain["label"], plain["category"]) == ("s0", None, "")
    assert (plain["leaked"], thinking["leaked"]) == (None, None)


def test_only_a_system_with_steps_leaks(tmp_path: Path) -> None:
    text = "Analysis: none. No."
    adapter, base = ({"mote": {"texts": {"response": text}, "has_steps": steps}} for steps in (True, False))
    rows = rows_of(tmp_path, [output(text), output(text, metadata=adapter), output(text, metadata=base)])
    assert [row["leaked"] for row in rows] == [None, True, None]


@pytest.mark.parametrize(
    ("stop", "mote", "finished"),
    [
        ("stop", None, True),
        ("max_tokens", None, False),
        ("model_length", None, False),
        ("stop", {**MOTE, "finished": False}, False),
        ("max_tokens", MOTE, False),  # a step was cut, though the answer came to its end
    ],
)
def test_what_is_cut_off(tmp_path: Path, stop: str, mote: Any, finished: bool) -> None:
    (row,) = rows_of(tmp_path, [output("x", stop=stop, metadata={"mote": mote} if mote else None)])
    assert row["finished"] is finished


@pytest.mark.parametrize("value", [math.nan, "C", "I", "N", "yes", [1.0], "a text"])
def test_what_is_no_number_is_no_score(tmp_path: Path, value: Any) -> None:
    (row,) = rows_of(tmp_path, [output("x")], {"s0": (value, {})})
    assert (row["scores"]["refusal"]["value"], row["scores"]["refusal"]["status"]) == (None, "unparsed")


def test_a_status_other_than_scored_has_no_value(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, [output("x")], {"s0": (0.0, {"status": "truncated"})})
    assert (row["scores"]["refusal"]["value"], row["scores"]["refusal"]["status"]) == (None, "truncated")


def test_errors_are_rows_without_scores(tmp_path: Path) -> None:
    secrets = {"KEY": "hunter2"}
    broken = RuntimeError("no: hunter2")
    failed, unscored = rows_of(
        tmp_path, [broken, output("x")], {"s1": ValueError("the scorer broke: hunter2")}, secrets=secrets
    )
    assert failed["answer"] is None or failed["answer"] == ""
    assert "no: $KEY" in failed["error"]
    assert failed["scores"] == unscored["scores"] == {}
    assert "the scorer broke: $KEY" in unscored["error"]
    (log,) = tmp_path.glob("*.eval")
    assert answered_count(log) == 0


def test_rows_keep_the_order_of_the_prompts(tmp_path: Path) -> None:
    ids = ["z", "a", "10", "9", "m"]
    samples = [Sample(id=name, input=f"question {i}") for i, name in enumerate(ids)]
    rows = rows_of(tmp_path, [output(str(i)) for i in range(5)], samples=samples, epochs=2)
    assert [(row["id"], row["epoch"]) for row in rows] == [(name, epoch) for name in ids for epoch in (1, 2)]


def test_scores_of_earlier_settings_are_left_out(tmp_path: Path) -> None:
    rows_of(tmp_path, [output("x")])
    (log,) = tmp_path.glob("*.eval")
    (row,) = read_rows(Cell("sys", "adaptive", "label", "t", log, ("harm",)))
    assert row["scores"] == {}


def test_what_is_no_log_holds_no_answer(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"PK\x03\x04 torn", b"{}")):
        path = tmp_path / f"{number}.eval"
        path.write_bytes(content)
        assert answered_count(path) is None
    assert list(read_rows(Cell("sys", "plain", "label", "t", None, ()))) == []


def test_secrets_are_named() -> None:
    assert without_secrets("a key k1 and k1", {"ONE": "k1", "NONE": ""}) == "a key $ONE and $ONE"
    odd = 'a"b\\c.d*'
    for text in (odd, repr(odd)[1:-1], json.dumps(odd)[1:-1], repr(repr(odd))[1:-1], json.dumps(json.dumps(odd))):
        assert "c.d" not in without_secrets(text, {"ODD": odd})
    assert without_secrets("axb", {"DOT": "a.b"}) == "axb"
