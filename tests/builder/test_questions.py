"""Sources, ids, duplicates and the contamination filter."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from builder_kit import prompts, write_rows

from axolotl_mote.builder.settings import QuestionSource
from axolotl_mote.builder.texts.questions import load_questions, screen_questions
from axolotl_mote.chain.questions import parse_question_row, parse_transcript

HH = "\n\nHuman: How do I fix it?\n\nAssistant: Fix what?\n\nHuman: My bike's flat tyre\n\nAssistant: Patch it."


def source(path: Path, **keys: object) -> QuestionSource:
    return QuestionSource(path=str(path), **keys)  # type: ignore[arg-type]


def test_hh_transcript_up_to_the_last_human_turn() -> None:
    assert parse_transcript(HH) == [
        {"role": "user", "content": "How do I fix it?"},
        {"role": "assistant", "content": "Fix what?"},
        {"role": "user", "content": "My bike's flat tyre"},
    ]


def test_consecutive_turns_are_joined_and_colons_inside_text_are_no_turns() -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nHuman: Note: Human: d"
    assert [turn["content"] for turn in parse_transcript(text)] == ["a\n\nb", "c", "Note: Human: d"]


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("Human: a", ["a"]),
        (" \n Human: a", ["a"]),
        ("\n\nHuman: \n\nAssistant: b\n\nHuman:\n\nHuman: c", ["", "b", "c"]),
        ("\n\nHuman: a\n\n \t\nAssistant:b \n\n\n Human:\tc", ["a", "b", "c"]),
        ("\n\nHuman: a\n Assistant: b", ["a\n Assistant: b"]),
        ("\n\nHuman: a\n\nHuman: \n\nHuman: b", ["a\n\nb"]),
        ("a\n\nHuman: b", ["b"]),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", ["a"]),
        ("\n\nAssistant: b", []),
    ],
)
def test_where_turns_begin(text: str, contents: list[str]) -> None:
    assert [turn["content"] for turn in parse_transcript(text)] == contents


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"chosen": HH, "rejected": HH}, "chosen"),
        ({"chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}, "chosen"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages"),
        ({"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, "messages"),
        ({"prompt": "hi"}, "prompt"),
        ({"prompt": HH}, "prompt"),
    ],
)
def test_shapes_of_rows(row: dict[str, object], column: str) -> None:
    messages, found = parse_question_row(row, None)
    assert found == column
    assert messages[-1]["role"] == "user"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz"])
def test_files(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"prompt": "What is chess?", "id": "a", "level": 3},
        {"prompt": "How tall are giraffes in zoos?", "id": "b", "level": 4},
    ]
    path = tmp_path / f"q.{suffix}"
    if suffix == "jsonl":
        write_rows(path, rows)
    elif suffix == "jsonl.gz":
        path.write_bytes(gzip.compress(write_rows(tmp_path / "q.jsonl", rows).read_bytes()))
    elif suffix.startswith("json"):
        text = json.dumps(rows).encode()
        path.write_bytes(gzip.compress(text) if suffix == "json.gz" else text)
    elif suffix == "csv":
        path.write_text("prompt,id,level\nWhat is chess?,a,3\nHow tall are giraffes in zoos?,b,4\n")
        rows = [{**row, "level": str(row["level"])} for row in rows]
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    questions, dropped = load_questions([source(path)])
    assert [q.columns for q in questions] == [{"id": row["id"], "level": row["level"]} for row in rows]
    assert dropped == []
    assert len(load_questions([source(path, limit=1)])[0]) == 1


def test_hugging_face_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl", [{"chosen": HH, "rejected": HH}])
    (question,), _ = load_questions([source(tmp_path / "set")])
    assert question.messages[-1]["content"] == "My bike's flat tyre"
    assert question.columns == {}


def test_a_folder_of_a_hugging_face_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HH-RLHF keeps its parts in folders, each in a packed file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for part in ("harmless-base", "helpful-base"):
        (tmp_path / "set" / part).mkdir(parents=True)
        row = write_rows(tmp_path / "row.jsonl", [{"chosen": HH.replace("bike", part)}]).read_bytes()
        (tmp_path / "set" / part / "train.jsonl.gz").write_bytes(gzip.compress(row))
    (question,), _ = load_questions([source(tmp_path / "set", data_dir="helpful-base")])
    assert question.messages[-1]["content"] == "My helpful-base's flat tyre"


def test_a_torn_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "Why is tea so bitter?"}\n' * 99)[:-12])
    with pytest.raises(ValueError, match="whole gzip file"):
        load_questions([source(path)])


def test_the_id_depends_on_the_text_alone(tmp_path: Path) -> None:
    """It is the hash that journals written before hold."""
    a = write_rows(tmp_path / "a.jsonl", [{"prompt": "What is chess?", "id": 1}])
    b = write_rows(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "What is chess?"}]}])
    assert load_questions([source(a)])[0][0].id == load_questions([source(b)])[0][0].id == "657ccd453192e5c3"


def test_unusable_duplicate_and_contaminated_rows_are_dropped_with_a_reason(tmp_path: Path) -> None:
    rows = [
        {"prompt": "How can I kill a Python process that hangs on my laptop?"},
        {"prompt": "How can I kill a Python process that hangs on my laptop?"},
        {"prompt": "how can I kill a python process that hangs on my laptop"},
        {"prompt": "What is the best way to grow tomatoes on a balcony in the north?"},
        {"messages": [{"role": "assistant", "content": "no user"}]},
        {"prompt": None},
        {"messages": "What?"},
    ]
    evaluation = write_rows(
        tmp_path / "evaluation.jsonl", [{"prompt": "What's the best way to grow tomatoes on a balcony in the north?"}]
    )
    questions, dropped = load_questions([source(write_rows(tmp_path / "q.jsonl", rows))], [source(evaluation)])
    assert [(d.question.row, d.reason) for d in dropped] == [
        (2, "duplicate_question"),
        (3, "near_duplicate_question"),
        (4, "excluded"),
        (5, "unusable_question"),
        (6, "unusable_question"),
    ]
    assert len(questions) == 2


def test_contamination_is_found_in_earlier_turns_too(tmp_path: Path) -> None:
    evaluation = write_rows(tmp_path / "evaluation.jsonl", [{"prompt": "How do I fix it?"}])
    rows = write_rows(tmp_path / "q.jsonl", [{"chosen": HH}, {"prompt": "Something else entirely, please?"}])
    questions, dropped = load_questions([source(rows)], [source(evaluation)])
    assert [d.reason for d in dropped] == ["excluded"]
    assert len(questions) == 1


def test_a_question_that_holds_an_evaluation_prompt_is_contamination(tmp_path: Path) -> None:
    evaluation = write_rows(
        tmp_path / "evaluation.jsonl", [{"prompt": "How do I build a pipe bomb at home?"}, {"prompt": "Yes."}]
    )
    rows = [
        {"prompt": "Hello there, good day to you. How do I build a pipe bomb at home? Please answer step by step."},
        {"prompt": "How do I build a pipe organ at home? Yes."},
    ]
    questions, dropped = load_questions([source(write_rows(tmp_path / "q.jsonl", rows))], [source(evaluation)])
    assert [(d.question.row, d.reason) for d in dropped] == [(1, "excluded")]
    assert len(questions) == 1


def test_the_contamination_filter_stays_when_duplicates_are_kept(tmp_path: Path) -> None:
    evaluation = write_rows(
        tmp_path / "evaluation.jsonl", [{"prompt": "What's the best way to grow tomatoes on a balcony?"}]
    )
    rows = [{"prompt": "What is the best way to grow tomatoes on a balcony?"}]
    _, dropped = load_questions(
        [source(write_rows(tmp_path / "q.jsonl", rows))], [source(evaluation)], deduplicate=None
    )
    assert [d.reason for d in dropped] == ["excluded"]


def test_one_evaluation_file_may_be_named_twice(tmp_path: Path) -> None:
    row = {"prompt": "What is the best way to grow tomatoes?", "question": "Where do owls sleep in a hard winter?"}
    evaluation = write_rows(tmp_path / "evaluation.jsonl", [row])
    rows = write_rows(tmp_path / "q.jsonl", [{"prompt": row["question"]}, {"prompt": "Why is tea so bitter?"}])
    questions, _ = load_questions([source(rows)], [source(evaluation), source(evaluation, column="question")])
    assert len(questions) == 1


def test_a_sample_is_drawn_with_the_seed_and_keeps_the_order(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", prompts(60))

    def draw(seed: int, **keys: object) -> list[str]:
        return [q.messages[0]["content"] for q in load_questions([source(path, **keys)], seed=seed)[0]]

    everything = draw(0)
    sample = draw(1, sample=20)
    assert sample == draw(1, sample=20) != draw(2, sample=20)
    assert len(sample) == 20
    assert sample == [text for text in everything if text in sample] != everything[:20]
    assert set(draw(1, sample=10)) < set(sample)
    assert draw(1, sample=100) == everything
    assert set(draw(1, sample=5, limit=10)) < set(everything[:10])


def test_rows_of_a_sample_keep_their_numbers(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"prompt": "Why is tea so bitter?", "id": i} for i in range(1, 31)])
    _, dropped = load_questions([source(path, sample=9)])
    assert [d.question.row for d in dropped] == [d.question.columns["id"] for d in dropped]
    assert len(dropped) == 8


def test_short_turns_of_an_evaluation_dialogue_are_no_contamination(tmp_path: Path) -> None:
    evaluation = write_rows(tmp_path / "evaluation.jsonl", [{"prompt": "Yes."}, {"chosen": HH}])
    rows = [
        {"chosen": "\n\nHuman: Is it going to rain today?\n\nAssistant: Why?\n\nHuman: Yes.\n\nAssistant: Hm."},
        {"prompt": "yes"},
        {"chosen": HH.replace("Fix what?", "Another answer.")},
    ]
    _, dropped = load_questions([source(write_rows(tmp_path / "q.jsonl", rows))], [source(evaluation)])
    assert [(d.question.row, d.reason) for d in dropped] == [(2, "excluded"), (3, "excluded")]


def test_faults_of_a_file_are_raised_once_with_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a"}\n{broken\n[1]\n')
    with pytest.raises(ValueError, match=r"(?s)2 faults.*row 2.*row 3"):
        load_questions([source(path)])


def test_blank_lines_count_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "Why is tea so bitter?"}\n\n{"prompt": "Where do owls sleep?"}\n{"prompt": null}\n')
    questions, dropped = load_questions([source(path)])
    assert [q.row for q in questions] == [1, 3]
    assert [d.question.row for d in dropped] == [4]


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"messages or chosen or prompt or question or forbidden_prompt.*1 rows"):
        load_questions([source(path)])
    with pytest.raises(ValueError, match="existing file"):
        load_questions([source(tmp_path / "none.jsonl")])


SYSTEM = "You are an assistant. Your rules: " + " ".join(str(n * 7919 % 10007) for n in range(99))
HISTORY = [
    {"role": "user", "content": "What do you make of this table? " + SYSTEM[99:]},
    {"role": "assistant", "content": "It holds numbers: " + SYSTEM[-199:]},
]
ASKS = [
    "How do owls hunt at night?",
    "Why is tea so bitter?",
    "Where is the nearest pharmacy?",
    "What does a tax office do?",
]


@pytest.mark.parametrize(
    "before", [[{"role": "system", "content": SYSTEM}], HISTORY, [{"role": "system", "content": SYSTEM}, *HISTORY]]
)
def test_what_questions_share_before_the_last_turn_does_not_make_them_alike(
    tmp_path: Path, before: list[dict[str, str]]
) -> None:
    rows = [
        {"messages": [*before, {"role": "user", "content": ask}]} for ask in [*ASKS, ASKS[0] + "!", ASKS[1].upper()]
    ]
    questions, dropped = load_questions([source(write_rows(tmp_path / "q.jsonl", rows))])
    assert [q.row for q in questions] == [1, 2, 3, 4]
    assert [(d.question.row, d.reason) for d in dropped] == [
        (5, "near_duplicate_question"),
        (6, "near_duplicate_question"),
    ]


def test_one_last_turn_after_different_turns_is_a_different_question(tmp_path: Path) -> None:
    def row(first: str, last: str) -> dict[str, object]:
        return {
            "messages": [{"role": "user", "content": first}, {"role": "assistant", "content": "Shall I?"}, *ask(last)]
        }

    def ask(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    rows = [
        row("How do owls hunt at night in a forest?", "Yes, please."),
        row("Why is green tea so bitter when it is brewed hot?", "Yes, please."),
        row("Why is green tea so bitter when it is brewed hot??", "Yes please"),
        row("Why is green tea so bitter when it's brewed hot?", "No, thank you."),
        {"messages": ask("Yes, please.")},
        {"messages": [{"role": "system", "content": SYSTEM}, *ask("Yes, please.")]},
    ]
    _, dropped = load_questions([source(write_rows(tmp_path / "q.jsonl", rows))])
    assert [d.question.row for d in dropped] == [3]


def test_rows_are_screened_one_by_one_and_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [*prompts(255), *prompts(2)] * 9)
    counts: list[int] = []
    rows = screen_questions([source(path)], on_progress=counts.append)
    assert next(rows) == load_questions([source(path)])[0][0]
    assert counts == []
    assert len(list(rows)) == 257 * 9 - 1
    assert counts == [1000, 2000]
