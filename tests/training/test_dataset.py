"""Chain data sets: files checked before axolotl reads them, rows encoded, long chains dropped."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from template_kit import ASK, STEPS, build_codec, row

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.rows import ChainDataError
from axolotl_mote.training.args import CHAIN_TYPE
from axolotl_mote.training.dataset import Columns, check_file, encode_dataset, show_routing

DictDefault = pytest.importorskip("axolotl.utils.dict").DictDefault

FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"response": None}, "response must be a non-empty string; got None."),
    ({"analysis": None}, "guidance must follow analysis; got it alone."),
    ({"messages": []}, "messages must be a non-empty list of turns; got []."),
    ({"messages": [{"role": "human", "content": "hi"}]}, "messages[0].role must be one of"),
]


@pytest.fixture(scope="session")
def codec(smollm2_dir: Path) -> ChainCodec:
    return build_codec(smollm2_dir)


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return path


def test_all_faults_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    bad = [fields for fields, _ in FAULTS]
    lines: list[Any] = [row(id=f"r{number}", **fields) for number, fields in enumerate(bad)]
    lines += ["{not json", "", "[1, 2]", row(id="r0"), row(id=None), row(id=None)]
    with pytest.raises(ChainDataError) as error:
        check_file(write(tmp_path / "bad.jsonl", lines), STEPS)
    text = str(error.value)
    for number, (_, message) in enumerate(FAULTS, start=1):
        assert f"row {number}: {message}" in text
    count = len(bad)
    assert f"row {count + 1}: the line must be JSON; got Expecting property name" in text
    assert f"row {count + 2}" not in text  # an empty line is no row
    assert f"row {count + 3}: the line must hold a JSON object; got list. Write one object per line." in text
    assert f"row {count + 4}: id must be unique; got 'r0' again, first at row 1. Drop one." in text
    assert f"{count + 3} faults; nothing was trained" in text
    assert str(tmp_path / "bad.jsonl") in text


def test_a_json_array_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "chains.json"
    path.write_text(json.dumps([row(id="a"), row(id="b", response="")]), encoding="utf-8")
    with pytest.raises(ChainDataError, match="row 2: response must be a non-empty string"):
        check_file(path, STEPS)
    path.write_text('[{"a": 1},\n {"b": }]', encoding="utf-8")
    with pytest.raises(ChainDataError, match=r"must be JSON; got Expecting value at line 2\. Correct the line\."):
        check_file(path, STEPS)


@pytest.mark.parametrize(
    ("value", "found"),
    [("[" * 100_000, "recursion"), ('{"id": ' + "1" * 5000 + "}", "digits")],
    ids=["nested", "digits"],
)
def test_a_json_array_that_python_cannot_read_is_refused(value: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "chains.json"
    path.write_text(f"[{json.dumps(row())},\n{value}]", encoding="utf-8")
    with pytest.raises(ChainDataError, match=rf"chains\.json must be JSON that can be read; got: .*{found}"):
        check_file(path, STEPS)


def test_a_file_that_is_not_utf8_is_reported_by_row(tmp_path: Path) -> None:
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\n" + b'{"response": "caf\xe9"}\n')
    with pytest.raises(ChainDataError, match="row 2: the line must be UTF-8"):
        check_file(path, STEPS)


# --- data sets ------------------------------------------------------------------------------------------------------


def as_jsonl(folder: Path, rows: list[Any]) -> dict[str, Any]:
    return {"path": str(write(folder / "c.jsonl", rows))}


def as_json(folder: Path, rows: list[Any]) -> dict[str, Any]:
    (folder / "c.json").write_text(json.dumps(rows), encoding="utf-8")
    return {"path": str(folder / "c.json")}


def as_parquet(folder: Path, rows: list[Any]) -> dict[str, Any]:
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(folder / "c.parquet")
    return {"path": str(folder / "c.parquet"), "ds_type": "parquet"}


@pytest.mark.parametrize("save", [as_jsonl, as_json, as_parquet], ids=["jsonl", "json", "parquet"])
def test_axolotl_loads_every_format(codec: ChainCodec, tmp_path: Path, save: Callable[..., dict[str, Any]]) -> None:
    from axolotl.utils.data.shared import load_dataset_with_config

    from axolotl_mote.chain import load

    two_turns = [*ASK, {"role": "assistant", "content": "Which?"}, *ASK]
    rows = [row(), row(id="2", analysis=None, guidance=None), row(id="3", guidance=None, messages=two_turns)]
    entry = DictDefault({"type": "axolotl_mote.chain", "split": "train", **save(tmp_path, rows)})
    dataset = load_dataset_with_config(entry, False, streaming=False)
    cfg = DictDefault({"sequence_len": 512, "mote": {"steps": STEPS}})
    encoded = load(codec.tokenizer, cfg, entry).wrap_dataset(dataset, process_count=1)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    assert encoded.to_list() == [codec.encode_chain(one) for one in rows]


def test_columns_that_look_tokenized_are_encoded_all_the_same(codec: ChainCodec, tmp_path: Path) -> None:
    from axolotl.utils.data import sft

    from axolotl_mote.training import compat

    tokens = {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [1, 2]}
    cfg = DictDefault({"sequence_len": 512, "mote": {"steps": STEPS}, "dataset_num_proc": 1})
    compat.encode_chains_with_token_columns("axolotl_mote.chain")
    try:
        for save in (as_jsonl, as_parquet):
            entry = DictDefault({"type": "axolotl_mote.chain", **save(tmp_path, [row(**tokens)])})
            encoded, _ = sft._load_and_process_single_dataset(entry, cfg, codec.tokenizer, "train", 0)
            assert encoded.to_list() == [codec.encode_chain(row())]
        other = DictDefault({"type": "other", **as_parquet(tmp_path, [tokens])})
        assert sft._load_and_process_single_dataset(other, cfg, codec.tokenizer, "train", 0)[0].to_list() == [tokens]
    finally:
        compat.undo_patches()


OTHER_NAMES = {
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
    "roles": {"user": ["human"], "assistant": ["gpt", "bot"]},
}


def renamed(messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    """A row in the style of ShareGPT."""
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in messages]
    return {"conversations": turns, **{key: value for key, value in row(**fields).items() if key != "messages"}}


def test_the_dialogue_may_have_other_names(codec: ChainCodec, tmp_path: Path) -> None:
    from datasets import Dataset

    from axolotl_mote.chain import load

    dialogue = [{"role": "system", "content": "Be brief."}, *ASK, {"role": "assistant", "content": "Which?"}, *ASK]
    rows = [renamed(ASK), renamed(dialogue, id="2")]
    check_file(write(tmp_path / "c.jsonl", rows), STEPS, Columns.of(OTHER_NAMES))
    cfg = DictDefault({"sequence_len": 512, "mote": {"steps": STEPS}})
    encoded = load(codec.tokenizer, cfg, DictDefault(OTHER_NAMES)).wrap_dataset(Dataset.from_list(rows))
    assert encoded.to_list() == [codec.encode_chain(row()), codec.encode_chain(row(messages=dialogue))]


def test_a_fault_tells_which_columns_were_read(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [row(), renamed([{"role": "nobody", "content": "x"}], id="2")])
    with pytest.raises(ChainDataError) as error:
        check_file(path, STEPS, Columns.of(OTHER_NAMES))
    text = str(error.value)
    assert "c.jsonl (messages from 'conversations', role from 'from', content from 'value') holds 2 faults" in text
    assert "row 1: messages must be a non-empty list of turns; got None" in text
    assert "row 2: messages[0].role must be one of" in text


def test_a_template_that_refuses_rows_names_them(smollm2_dir: Path) -> None:
    from datasets import Dataset

    strict = build_codec(smollm2_dir, "mistral")
    system = [{"role": "system", "content": "x"}, *ASK]
    rows = [row(), row(id="2", messages=system), row(id="3", guidance=None), row(id="4", messages=system)]
    with pytest.raises(ChainDataError) as error:
        encode_dataset(Dataset.from_list(rows), strict, 512, "data/chains.jsonl")
    text = str(error.value)
    assert text.startswith("data/chains.jsonl holds 2 faults; nothing was trained.")
    for number in (2, 4):
        assert f"row {number}: messages must suit the chat template; it says: only user and assistant turns" in text


def test_a_template_that_refuses_every_row_says_so(smollm2_dir: Path) -> None:
    """It is asked about its end of turn too."""
    from datasets import Dataset

    from axolotl_mote.chain import load

    tokenizer = build_codec(smollm2_dir).tokenizer
    tokenizer.chat_template = "{{ raise_exception('no') }}" + tokenizer.chat_template
    strategy = load(tokenizer, DictDefault({"sequence_len": 512, "mote": {"steps": STEPS}}), DictDefault({"path": "c"}))
    with pytest.raises(ChainDataError, match=r"^c holds 1 fault; (?s:.*)row 1: messages must suit .* it says: no"):
        strategy.wrap_dataset(Dataset.from_list([row()]))


@pytest.mark.parametrize(
    ("condition", "warning"),
    [
        (
            "if thinking is not false",
            "opens <think> and does not close it, .* Set chat_template_kwargs: {thinking: false}",
        ),
        ("if true", r"opens <think> and does not close it, .* Use a chat_template that closes it\."),
        ("if thinking", None),
    ],
)
def test_a_block_that_the_template_leaves_open_is_a_warning(
    smollm2_dir: Path, caplog: pytest.LogCaptureFixture, condition: str, warning: str | None
) -> None:
    from axolotl_mote.chain import load

    tokenizer = build_codec(smollm2_dir).tokenizer
    tokenizer.chat_template += "{% if add_generation_prompt %}{% " + condition + " %}<think>\n{% endif %}{% endif %}"
    load(tokenizer, DictDefault({"sequence_len": 512, "mote": {"steps": STEPS}}), DictDefault({"path": "c.jsonl"}))
    assert re.search(warning, caplog.text) if warning else "opens" not in caplog.text


def test_the_rows_of_any_data_set_are_checked(codec: ChainCodec) -> None:
    from datasets import Dataset

    rows = [row(id="a"), row(id="a", response=""), row(id="c", messages=[{"role": "bot", "content": "x"}])]
    with pytest.raises(ChainDataError) as error:
        encode_dataset(Dataset.from_list(rows), codec, 512, "hub/chains")
    for part in (
        "hub/chains holds 3 faults",
        "row 2: id must be unique",
        "row 2: response must",
        "row 3: messages[0].role",
    ):
        assert part in str(error.value)


def test_workers_change_nothing(codec: ChainCodec) -> None:
    """Neither do rows that come in another order than they are stored in."""
    from datasets import Dataset

    rows = [row(id=str(number), response="word " * (number % 5 + 1)) for number in range(40)]
    data = Dataset.from_list(rows).select(range(39, -1, -1))
    limit = len(codec.encode_chain(rows[3])["input_ids"])
    alone, shared = (encode_dataset(data, codec, limit, process_count=count) for count in (None, 2))
    expected = [codec.encode_chain(one) for one in rows[::-1] if int(one["id"]) % 5 < 4]
    assert alone.to_list() == shared.to_list() == expected

    rows[5]["id"], rows[30]["response"] = "4", ""
    data, said = Dataset.from_list(rows).select(range(39, -1, -1)), []
    for count in (None, 2):
        with pytest.raises(ChainDataError) as error:
            encode_dataset(data, codec, limit, process_count=count)
        said.append(str(error.value))
    assert said[0] == said[1]
    for part in ("2 faults", "row 10: response must", "row 36: id must be unique; got '4' again, first at row 35"):
        assert part in said[0]


def test_rows_that_other_code_has_encoded_are_encoded_again(
    codec: ChainCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version may find a fault in what an earlier one has left in the cache."""
    from datasets import Dataset

    from axolotl_mote.training import dataset

    path = str(write(tmp_path / "c.jsonl", [row()]))

    def encode() -> Any:
        return encode_dataset(Dataset.from_json(path, cache_dir=str(tmp_path / "cache")), codec, 512)

    first = encode()
    assert first.cache_files == encode().cache_files != []
    monkeypatch.setattr(dataset, "code_digest", lambda: "a later version")
    assert first.cache_files != encode().cache_files


def test_columns_of_the_data_are_not_taken_for_ours(codec: ChainCodec) -> None:
    from datasets import ClassLabel, Dataset

    data = Dataset.from_list([{**row(), "form": 0, "faults": 0}])
    for name in ("form", "faults"):
        data = data.cast_column(name, ClassLabel(names=["short", "long"]))
    assert encode_dataset(data, codec, 512).to_list() == [codec.encode_chain(row())]


def test_a_file_is_checked_once_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl_mote.training import dataset
    from axolotl_mote.training.plugin import MotePlugin

    checked: list[str] = []

    def counting(path: Path, steps: Sequence[str], columns: Columns) -> None:
        check_file(path, steps, columns)
        checked.append(path.name)

    monkeypatch.setattr(dataset, "check_file", counting)
    monkeypatch.chdir(tmp_path)

    def load(entry: dict[str, Any], **changes: Any) -> int:
        """Register and load as every process of a run does; returns how many files were checked."""
        checked.clear()
        cfg = DictDefault(
            {
                "adapter": "mote",
                "lora_r": 4,
                "lora_target_linear": True,
                "datasets": [{"type": CHAIN_TYPE, **entry}],
                **changes,
            }
        )
        plugin = MotePlugin()
        plugin.register(cfg)
        plugin.load_datasets(cfg)
        return len(checked)

    entry = as_jsonl(tmp_path, [row()])
    assert [load(entry), load(entry)] == [1, 0]
    assert load({**entry, "roles": {"user": ["human"]}}) == 1
    assert load(entry, mote={"steps": STEPS[1:]}) == 1
    as_jsonl(tmp_path, [row(response="other")])
    assert [load(entry), load(entry)] == [1, 0]
    as_jsonl(tmp_path, [row(response="")])
    for _ in range(2):  # a fault is never remembered as checked
        with pytest.raises(ChainDataError):
            load(entry)


def test_long_chains_are_dropped_and_counted_never_cut(codec: ChainCodec, caplog: pytest.LogCaptureFixture) -> None:
    from datasets import Dataset

    rows = [row(id=str(number), response="word " * (10 * number + 1)) for number in range(5)]
    encoded = [codec.encode_chain(one) for one in rows]
    limit = len(encoded[2]["input_ids"])  # exactly as long as allowed
    with caplog.at_level(logging.INFO, logger="axolotl.mote"):
        kept = encode_dataset(Dataset.from_list(rows), codec, limit, "mine")
    assert kept.to_list() == encoded[:3]
    assert f"mine: dropped 2 of 5 chains longer than sequence_len {limit}." in caplog.text
    assert "mine: kept 3 of 5 chains; chain forms of all: {'analysis+guidance+response': 5}" in caplog.text
    caplog.clear()
    encode_dataset(Dataset.from_list(rows), codec, 512)
    assert "dropped" not in caplog.text


def test_a_data_set_of_long_chains_only_is_refused(codec: ChainCodec) -> None:
    from datasets import Dataset

    message = (
        r"sequence_len must fit at least one chain of mine; got 8, all 1 chains are longer .* Raise sequence_len\."
    )
    with pytest.raises(ChainDataError, match=message):
        encode_dataset(Dataset.from_list([row()]), codec, 8, "mine")


def test_an_empty_data_set_is_refused(codec: ChainCodec, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(ChainDataError, match=r"empty\.jsonl must hold at least one chain; got none\. Add rows\."):
        check_file(path, STEPS)


def test_the_prepared_cache_notices_the_steps() -> None:
    from axolotl.utils.data.shared import generate_dataset_hash_from_config

    from axolotl_mote.training.plugin import MotePlugin

    def key(steps: list[str], special: list[str] | None = None) -> str:
        datasets = [{"path": "c.jsonl", "type": "axolotl_mote.chain"}]
        raw: dict[str, Any] = {"adapter": "mote", "lora_r": 1, "lora_target_linear": True, "datasets": datasets}
        if special:
            raw["special_tokens"] = {"additional_special_tokens": special}
        raw["mote"] = {"steps": steps}
        MotePlugin().register(raw)
        return generate_dataset_hash_from_config(DictDefault(raw), [DictDefault(datasets[0])], "tokenizer")

    settings_ = [["response"], ["analysis", "response"], STEPS, [*STEPS, "check"], ["guidance", "analysis", "response"]]
    assert len({key(steps) for steps in settings_}) == len(settings_)
    assert key(STEPS) == key(STEPS)


def test_routing_is_shown_in_colors(codec: ChainCodec, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    # Not the environment: datasets' map in several processes puts a copy in its place, and rich keeps the old one.
    monkeypatch.setattr("rich.console.Console._environ", {"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    messages = [{"role": "user", "content": "[bold]<|analysis|>"}]
    encoded = codec.encode_chain(row(messages=messages))
    show_routing(codec, encoded["input_ids"])
    shown = capsys.readouterr().out
    colors, color = [], ""
    for code, character in re.findall(r"(?s)\x1b\[([\d;]*)m|(.)", shown):
        color = color if character else code
        if character:
            colors.append(color)
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert plain.startswith("routing: question analysis guidance response")
    assert "[bold]" in plain  # user text is not markup

    def colors_of(text: str) -> set[str]:
        start = plain.rindex(text)
        return set(colors[start : start + len(text)])

    parts = ["[bold]<|analysis|>", "<|analysis|>Killing is a process here.<|/analysis|>"]
    parts += ["<|guidance|>Name the signal.<|/guidance|>", "<|response|>Use kill.<|/response|>"]
    assert [len(colors_of(part)) for part in parts] == [1, 1, 1, 1]
    assert len(set.union(*map(colors_of, parts))) == 4
    assert colors_of(parts[0]) == colors_of("<|im_end|>")
