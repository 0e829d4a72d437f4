"""The `mote:` block and what `adapter: mote` refuses, each by its message; foreign configurations are left alone."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from template_kit import axolotl_templates

from axolotl_mote.training.args import (
    COLUMN_KEYS,
    KERNELS,
    LOADING_KEYS,
    REFUSED,
    REFUSED_ABOVE_ONE,
    REFUSED_IN_DATASETS,
    REFUSED_PLUGINS,
    REFUSED_WITH_CHAINS,
    MoteArgs,
    MoteOptions,
    chain_entries,
    check,
    check_config,
)
from axolotl_mote.training.dataset import Columns

STEPS = ["analysis", "guidance", "response"]


def config(**changes: Any) -> dict[str, Any]:
    """A configuration that is accepted, with changes."""
    return {"adapter": "mote", "lora_r": 16, "lora_target_linear": True, **changes}


# --- the block ------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    options = MoteOptions()
    assert options.steps == STEPS
    assert (options.expert_weight, options.question_routing, options.step_dropout) == (0.5, "random", 0.3)
    assert options.droppable_steps == ["analysis", "guidance"]
    assert options.dropout_probabilities == (0.3, 0.3)
    assert options.loss_weights == [1.0, 1.0, 1.0, 1.0]


def test_values_per_step_are_ordered_as_the_steps_whatever_the_order_of_the_keys() -> None:
    options = MoteOptions(
        steps=[*STEPS, "check"],
        step_dropout={"guidance": 0.2, "analysis": 0.7},
        step_loss_weights={"check": 0.0, "analysis": 0.5},
    )
    assert options.droppable_steps == ["analysis", "guidance"]
    assert options.dropout_probabilities == (0.7, 0.2)
    assert options.loss_weights == [1.0, 0.5, 1.0, 1.0, 0.0]
    assert MoteOptions(step_dropout={"guidance": 0.2}).dropout_probabilities == (0.0, 0.2)


def test_a_single_step_has_nothing_to_drop() -> None:
    assert MoteOptions(steps=["response"]).dropout_probabilities == ()
    assert MoteOptions(steps=["response", "check"]).dropout_probabilities == ()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_bounds_are_inside(value: float) -> None:
    options = MoteOptions(expert_weight=value, step_dropout=value)
    assert options.expert_weight == value
    assert options.dropout_probabilities == (value, value)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"step_dropuot": 0.1}, r"step_dropuot\s+Extra inputs are not permitted"),
        ({"expert_weight": 1.01}, r"expert_weight\s+Input should be less than or equal to 1"),
        ({"expert_weight": -0.01}, r"expert_weight\s+Input should be greater than or equal to 0"),
        ({"question_routing": "any"}, r"question_routing\s+Input should be 'random', 'mean' or 'shared'"),
        ({"step_dropout": 1.5}, r"mote\.step_dropout must be in \[0, 1\]; got 1\.5\. Use e\.g\. 0\.3\."),
        ({"step_dropout": -0.1}, r"mote\.step_dropout must be in \[0, 1\]; got -0\.1"),
        ({"step_dropout": {"guidance": 2.0}}, r"mote\.step_dropout must be in \[0, 1\]; got 2\.0"),
        (
            {"step_dropout": {"response": 0.1}},
            r"mote\.step_dropout must name steps before the answer, \['analysis', 'guidance'\]; got 'response'\. R",
        ),
        ({"step_dropout": {"anlysis": 0.1}}, r"mote\.step_dropout must name steps .* got 'anlysis'\. Remove it\."),
        ({"step_loss_weights": {"check": 1.0}}, r"mote\.step_loss_weights must name steps of .*; got 'check'\. Rename"),
        (
            {"step_loss_weights": {"analysis": -1.0}},
            r"mote\.step_loss_weights must be 0 or more; got -1\.0 at 'analysis'\. Raise it\.",
        ),
        ({"steps": []}, r"mote\.steps must hold at least the answer step; got \[\]\. Add 'response'\."),
        ({"steps": ["check"]}, r"mote\.steps must hold at least the answer step; got \['check'\]"),
        ({"steps": ["a", "a"]}, r"mote\.steps must not repeat a name; got \['a', 'a'\]\. Remove the duplicate\."),
        ({"steps": ["check", "response"]}, r"mote\.steps must hold 'check' only after the answer; got .* Move it"),
        ({"steps": ["question", "response"]}, r"mote\.steps must not hold 'question'; .* Rename the step\."),
        ({"steps": ["Analysis"]}, r"mote\.steps must hold lower-case names .*; got 'Analysis'\. Rename the step\."),
        ({"steps": ["a|>"]}, r"mote\.steps must hold lower-case names .*; got 'a\|>'\. Rename the step\."),
        ({"steps": ["a\n"]}, r"mote\.steps must hold lower-case names .*; got 'a\\n'"),
    ],
)
def test_a_bad_block_is_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoteOptions(**block)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["expert_weight", "step_dropout"])
def test_a_value_that_is_no_number_is_refused(key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=key):
        MoteOptions(**{key: value})
    with pytest.raises(ValidationError, match="step_loss_weights must be 0 or more"):
        MoteOptions(step_loss_weights={"analysis": value})


# --- unsupported keys ----------------------------------------------------------------------------------------------


def test_a_good_configuration_passes() -> None:
    check_config(config())
    check_config(config(lora_target_linear=None, lora_target_modules=["q_proj"]))
    check_config(config(peft_init_lora_weights="gaussian", **dict.fromkeys(KERNELS, False)))


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_an_unsupported_key_is_refused_with_what_to_do(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key} must not be set with adapter: mote; got True\. \w.*\.$") as error:
        check_config(config(**{key: True}))
    assert REFUSED[key] in str(error.value)
    check_config(config(**{key: False}))
    check_config(config(**{key: None}))


@pytest.mark.parametrize("adapter", ["mote", "lora"])
@pytest.mark.parametrize(("key", "value"), [*dict.fromkeys(REFUSED_WITH_CHAINS, True).items(), ("x", "cut")])
def test_chain_data_is_refused_with_what_would_change_it(key: str, value: Any, adapter: str) -> None:
    key, value = ("excess_length_strategy", "truncate") if key == "x" else (key, value)
    with pytest.raises(ValidationError, match=rf"{key} must .* with chain data; got"):
        MoteArgs.model_validate(config(adapter=adapter, datasets=[CHAINS], **{key: value}))
    MoteArgs.model_validate(config(adapter="lora", datasets=[TEXT], **{key: value}))


@pytest.mark.parametrize("adapter", ["mote", "lora"])
@pytest.mark.parametrize("name", REFUSED_PLUGINS)
def test_a_plugin_that_would_replace_the_loss_or_the_trainer_is_refused(name: str, adapter: str) -> None:
    plugins = ["axolotl_mote.MotePlugin", f"axolotl.integrations.some.{name}"]
    with pytest.raises(ValidationError, match=rf"plugins must not hold this one with chain data; got \S+\.{name}\. \w"):
        MoteArgs.model_validate(config(adapter=adapter, datasets=[CHAINS], plugins=plugins))
    MoteArgs.model_validate(config(adapter="lora", datasets=[TEXT], plugins=plugins))
    plugins[1] = "axolotl.integrations.liger.LigerPlugin"
    MoteArgs.model_validate(config(adapter=adapter, datasets=[CHAINS], plugins=plugins))


@pytest.mark.parametrize("name", REFUSED_PLUGINS)
def test_axolotl_has_the_plugins_that_are_refused(name: str) -> None:
    """A plugin that it renames would be accepted."""
    folder = Path(pytest.importorskip("axolotl.integrations").__path__[0])
    assert any(f"class {name}(" in file.read_text("utf-8") for file in folder.rglob("*.py"))


def test_lm_eval_must_not_read_the_adapter_folder() -> None:
    plugins = ["axolotl_mote.MotePlugin", "axolotl.integrations.lm_eval.LMEvalPlugin"]
    for value in ({}, {"lm_eval_post_train": None}, {"lm_eval_post_train": True}):
        with pytest.raises(ValueError, match=r"^lm_eval_post_train must be false with adapter: mote; got true\. \w"):
            check_config(config(plugins=plugins, **value))
    check_config(config(plugins=plugins, lm_eval_post_train=False))
    check_config(config(plugins=plugins, lm_eval_model="meta-llama/Llama-3.1-8B"))
    check_config(config(lm_eval_post_train=True))


@pytest.mark.parametrize("targets", ["lm_head", ["q_proj", "lm_head"], ["model.embed_tokens"]])
def test_the_ends_of_the_model_carry_no_experts(targets: Any) -> None:
    with pytest.raises(ValueError, match="lora_target_modules must name linear layers of the decoder"):
        check_config(config(lora_target_modules=targets))
    check_config(config(lora_target_modules=["q_proj"]))


@pytest.mark.parametrize("key", REFUSED_ABOVE_ONE)
def test_a_split_sequence_or_layer_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key} must be 1 with adapter: mote; got 2\. .*Use DeepSpeed ZeRO-3"):
        check_config(config(**{key: 2}))
    check_config(config(**{key: 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_init_lora_weights": "pissa"},
            r"^peft_init_lora_weights must be true, false or gaussian .* got 'pissa'",
        ),
        (
            {"peft": {"loftq_config": {"loftq_bits": 4}}},
            r"^peft\.loftq_config must not be set with adapter: mote; got .*Rem",
        ),
        ({"lora_r": None}, r"^lora_r must be set with adapter: mote; got none\. Use the paper's 16"),
        (
            {"lora_target_linear": False},
            r"^lora_target_linear or lora_target_modules must be set with adapter: mote; g",
        ),
        ({"fsdp_config": {"a": 1}}, r"^fsdp_version must be 2 with adapter: mote; got none, which means 1\."),
        (
            {"fsdp_config": {"fsdp_version": 1}},
            r"^fsdp_version must be 2 with adapter: mote; got 1\. .*fsdp_version: 2",
        ),
        (
            {"fsdp_version": 2, "fsdp_config": {"fsdp_version": 1}},
            r"^fsdp_version must be 2 with adapter: mote; got 2 and 1\.",
        ),
        (
            {"fsdp_version": 2, "fsdp_config": {"offload_params": True}},
            r"^fsdp_config\.offload_params must not be true",
        ),
        (
            {"fsdp_config": {"version": "2"}, "generate_samples": True},
            r"^generate_samples must not be set with fsdp_config",
        ),
        (
            {"fsdp_version": 2, "fsdp_config": {"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}},
            r"^fsdp_config\.auto_wrap_policy must be TRANSFORMER_BASED_WRAP .*; got SIZE_BASED_WRAP",
        ),
        (
            {"fsdp_config": {"version": 2}, "load_in_4bit": True},
            r"^load_in_4bit must not be set with fsdp_config .* Use DeepSpeed ZeRO-3\.$",
        ),
        (
            {"fsdp_config": {"version": 2}, "load_in_8bit": True},
            r"^load_in_8bit must not be set with fsdp_config .* Use DeepSpeed ZeRO-3\.$",
        ),
        ({"inference": True}, r"^lora_model_dir must name a trained adapter for inference .* Pass --lora-model-dir\.$"),
    ],
)
def test_other_bad_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(config(**changes))


@pytest.mark.parametrize("spelling", ["version", "fsdp_version"])
def test_fsdp2_passes_in_every_spelling(spelling: str) -> None:
    check_config(config(fsdp_version=2, fsdp_config={"reshard_after_forward": True}))
    check_config(config(fsdp_config={spelling: 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}))
    check_config(config(fsdp_config=None, load_in_4bit=True))


def test_a_baseline_on_chains_cannot_be_sharded_by_fsdp() -> None:
    with pytest.raises(
        ValueError, match=r"^fsdp_config must not be set with chain data and adapter: lora; got .*Use d"
    ):
        check({"adapter": "lora", "datasets": [CHAINS], "fsdp_version": 2, "fsdp_config": {"version": 2}})


def test_inference_with_an_adapter_folder_passes() -> None:
    check_config(config(inference=True, lora_model_dir="out"))


def test_other_adapters_may_use_all_of_it() -> None:
    MoteArgs.model_validate(
        {"adapter": "lora", "lora_mlp_kernel": True, "peft_use_dora": True, "fsdp_config": {"a": 1}}
    )
    with pytest.raises(ValidationError, match="lora_mlp_kernel must not be set with adapter: mote"):
        MoteArgs.model_validate(config(lora_mlp_kernel=True))


# --- through axolotl ------------------------------------------------------------------------------------------------

CPU = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 0, "compute_capability": None}
TEXT = {"path": "alpaca.jsonl", "type": "alpaca"}
CHAINS = {"path": "chains.jsonl", "type": "axolotl_mote.chain"}


def validated(raw: dict[str, Any]) -> Any:
    """Register the plugin and validate, as every axolotl command does."""
    pytest.importorskip("axolotl")
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(
        {
            "base_model": "any",
            "plugins": ["axolotl_mote.MotePlugin"],
            "sequence_len": 64,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            **raw,
        }
    )
    prepare_plugins(cfg)
    return validate_config(cfg, capabilities=CPU, env_capabilities={"torch_version": "2.13.0"})


def test_axolotl_accepts_the_block_and_adds_the_markers() -> None:
    cfg = validated(config(datasets=[CHAINS], mote={"steps": ["plan", "answer"]}))
    assert list(cfg.mote.steps) == ["plan", "answer"]
    assert cfg.special_tokens.additional_special_tokens == ["<|plan|>", "<|/plan|>", "<|answer|>", "<|/answer|>"]


def test_the_users_special_tokens_are_kept() -> None:
    special = {"pad_token": "<pad>", "additional_special_tokens": ["<mine>", "<|response|>"]}
    cfg = validated(config(datasets=[CHAINS], mote={"steps": ["response"]}, special_tokens=special))
    assert cfg.special_tokens.pad_token == "<pad>"
    assert cfg.special_tokens.additional_special_tokens == ["<mine>", "<|response|>", "<|/response|>"]


def as_jsonl(folder: Path, text: str) -> str:
    (folder / "chains.jsonl").write_text(json.dumps({"response": text}))
    return str(folder / "chains.jsonl")


def as_parquet_folder(folder: Path, text: str) -> str:
    from datasets import Dataset

    (folder / "parquet" / "train").mkdir(parents=True, exist_ok=True)
    Dataset.from_list([{"response": text}]).to_parquet(folder / "parquet" / "train" / "0.parquet")
    return str(folder / "parquet")


def as_arrow_folder(folder: Path, text: str) -> str:
    from datasets import Dataset

    Dataset.from_list([{"response": text}]).save_to_disk(folder / "arrow")
    (folder / "arrow" / "cache-0123.arrow").write_text(text * 2)  # what datasets.map leaves there
    return str(folder / "arrow")


def as_linked_folder(folder: Path, text: str) -> str:
    """A folder that holds a link to the rows, and one back to itself."""
    rows = Path(as_parquet_folder(folder, text))
    (folder / "linked").mkdir(exist_ok=True)
    for name, target in (("rows", rows), ("self", folder / "linked")):
        (folder / "linked" / name).unlink(missing_ok=True)
        (folder / "linked" / name).symlink_to(target)
    return str(folder / "linked")


@pytest.mark.parametrize("named", ["path", "data_files"])
@pytest.mark.parametrize("save", [as_jsonl, as_parquet_folder, as_arrow_folder, as_linked_folder])
def test_prepared_chains_are_known_by_their_content(tmp_path: Path, save: Callable[..., str], named: str) -> None:
    def prepared(content: str, where: str | None = "prepared") -> str:
        path = save(tmp_path, content)
        entry = (
            {**CHAINS, "path": str(tmp_path), "data_files": [path]}
            if named == "data_files"
            else {**CHAINS, "path": path}
        )
        return str(validated(config(datasets=[entry], dataset_prepared_path=where)).dataset_prepared_path)

    first = prepared("a")
    assert first.startswith("prepared/")
    if save is as_arrow_folder:
        (tmp_path / "arrow" / "cache-4567.arrow").write_text("more")
    assert first == prepared("a") != prepared("b")
    assert prepared("a", None) == first.replace("prepared", "last_run_prepared", 1)  # axolotl's own default


@pytest.mark.parametrize("name", ["base/tokenizer.json", "base/chat_template.jinja", "template.jinja"])
def test_prepared_chains_are_known_by_their_tokenizer_and_template(tmp_path: Path, name: str) -> None:
    (tmp_path / "base").mkdir()

    def prepared(content: str) -> str:
        (tmp_path / name).write_text(content)
        raw = config(datasets=[CHAINS], base_model=str(tmp_path / "base"))
        if name == "template.jinja":
            raw |= {"chat_template": "jinja", "chat_template_jinja": str(tmp_path / name)}
        return str(validated(raw).dataset_prepared_path)

    assert prepared("a") == prepared("a") != prepared("b")


# --- entries of datasets ------------------------------------------------------------------------------------------


def test_every_key_of_axolotls_data_sets_is_supported_or_refused_by_name() -> None:
    schema = pytest.importorskip("axolotl.utils.schemas.datasets").SFTDataset.model_fields
    known = [*LOADING_KEYS, *COLUMN_KEYS, *REFUSED_IN_DATASETS]
    assert set(schema) <= set(known)
    assert len(set(known)) == len(known)


@pytest.mark.parametrize("adapter", ["mote", "lora"])
@pytest.mark.parametrize("place", ["datasets", "test_datasets"])
@pytest.mark.parametrize("key", REFUSED_IN_DATASETS)
def test_a_key_of_a_data_set_that_would_be_ignored_is_refused(key: str, place: str, adapter: str) -> None:
    entries = {"datasets": [CHAINS], place: [TEXT, {**CHAINS, key: ["x"]}]}
    with pytest.raises(
        ValueError, match=rf"{place}\[1\]\.{key} must not be set with chain data; got \['x'\]\. \w"
    ) as error:
        validated(config(adapter=adapter, **entries))
    assert REFUSED_IN_DATASETS[key] in str(error.value)
    validated(config(adapter=adapter, datasets=[{**CHAINS, key: None}]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feild_messages": "x"}, r"datasets\[0\]\.feild_messages is no key of chain data; got 'x'\. Correct its"),
        (
            {"message_property_mappings": {"weight": "w"}},
            r"datasets\[0\]\.message_property_mappings must name role or content with chain data; got 'weight'\.",
        ),
        ({"roles": {"tool": ["tool"]}}, r"datasets\[0\]\.roles must name system or user or assistant .* got 'tool'"),
    ],
)
def test_a_key_that_no_data_set_has_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validated(config(datasets=[{**CHAINS, **changes}]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"roles": value}, r"roles must be the names of roles in the rows: `\{user: \[human\], .*; got .* Write")
            for value in (5, "user", ["user"], {"user": "human"}, {"user": None}, {"user": 5}, {"user": [["human"]]})
        ),
        ({"roles": {"user": ["x"], "assistant": ["x"]}}, r"roles must .* one role; got 'x' for user and assistant\."),
        *(
            ({"message_property_mappings": value}, r"message_property_mappings must be the keys of a turn, .*; got")
            for value in (7, "role", ["role"], {"role": 5}, {"role": ["from"]})
        ),
        *(
            ({key: ["m"]}, rf"{key} must be the .*; got \['m'\]\. Write")
            for key in ("field_messages", "message_field_role")
        ),
    ],
)
def test_a_key_that_names_columns_in_another_form_is_refused(changes: dict[str, Any], message: str) -> None:
    """Some of them are accepted by axolotl's schema, of another kind of data set."""
    with pytest.raises(ValueError, match=r"datasets\[0\]\." + message):
        check(config(datasets=[{**CHAINS, **changes}]))


def test_keys_of_a_data_set_that_work() -> None:
    entry = {
        **CHAINS,
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
        "roles": {"user": ["human"]},
        "split": "train",
        "shards": 2,
    }
    older = {**entry, "message_field_role": "from", "message_field_content": "value"}
    del older["message_property_mappings"]
    expected = Columns("conversations", "from", "value", {"human": "user"})
    for given in (entry, older):
        cfg = validated(config(datasets=[CHAINS], test_datasets=[given]))
        assert [Columns.of(one) for one in chain_entries(cfg).values()] == [Columns(), expected]


def test_a_baseline_is_checked_through_axolotl_too() -> None:
    """axolotl turns the entries into models before it validates."""
    with pytest.raises(ValueError, match="train_on_inputs must not be set with chain data"):
        validated(config(adapter="lora", datasets=[CHAINS], train_on_inputs=True))


def test_mote_without_chains_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    message = (
        r"datasets must hold chain data with adapter: mote; got type alpaca only\. .*Use type: axolotl_mote\.chain, or"
    )
    with pytest.raises(ValueError, match=message):
        validated(config(datasets=[TEXT]))
    validated(config(datasets=[TEXT], inference=True, lora_model_dir="out"))
    with caplog.at_level(logging.WARNING, logger="axolotl.mote"):
        validated(config(datasets=[CHAINS], test_datasets=[CHAINS]))
        assert "is no chain data" not in caplog.text
        validated(config(datasets=[CHAINS, TEXT]))
    assert "datasets[1] is no chain data: all its tokens are routed as a question" in caplog.text


# --- the chat template --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{}, {"chat_template": "tokenizer_default"}, {"chat_template": "qwen3"}])
def test_chat_template_kwargs_become_a_part_of_the_template(
    choice: dict[str, Any], smollm2_dir: Path, tmp_path: Path
) -> None:
    """So they are saved beside the adapter, and hold in every later rendering."""
    from axolotl.loaders import load_tokenizer
    from axolotl.utils.config import normalize_config
    from transformers import AutoTokenizer

    from axolotl_mote.chain.codec import ChainCodec

    base = AutoTokenizer.from_pretrained(smollm2_dir)
    if choice.get("chat_template") != "qwen3":
        base.chat_template = axolotl_templates()["qwen3"]
    base.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((smollm2_dir / "config.json").read_text())
    raw = config(base_model=str(tmp_path), datasets=[CHAINS], chat_template_kwargs={"enable_thinking": False}, **choice)
    cfg = validated(raw)
    normalize_config(cfg)
    trained = load_tokenizer(cfg)
    trained.save_pretrained(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    ask = [{"role": "user", "content": "Hi"}]
    question = ChainCodec(trained, STEPS).encode_question(ask)
    assert trained.decode(question).endswith("assistant\n<think>\n\n</think>\n\n")
    assert question == ChainCodec(loaded, STEPS).encode_question(ask)
    assert question == loaded.apply_chat_template(ask, add_generation_prompt=True, return_dict=False)

    with pytest.raises(ValueError, match=r"chat_template_kwargs must name variables of the chat template, .*'thinkng'"):
        validated({**raw, "chat_template_kwargs": {"thinkng": False}})


def test_inference_gets_a_chat_template() -> None:
    assert validated(config(datasets=[CHAINS], inference=True, lora_model_dir="x")).chat_template == "tokenizer_default"
    assert validated(config(datasets=[CHAINS])).chat_template is None


@pytest.mark.parametrize("name", ["r", "lora_alpha", "expert_weight", "question_routing", "steps", "marker_ids"])
def test_a_loaded_adapter_must_be_what_the_yaml_says(name: str) -> None:
    from dataclasses import replace

    from axolotl_mote.model.config import MoteConfig
    from axolotl_mote.training.plugin import check_trained_config

    config = MoteConfig(r=4, lora_alpha=8, steps=["a", "b"], marker_ids=[1, 2, 3, 4])
    assert check_trained_config(config, replace(config), "out") is config
    other = {"question_routing": "shared", "steps": ["a", "c"], "marker_ids": [1, 2, 3, 5], "expert_weight": 0.25}.get(
        name, 2
    )
    with pytest.raises(ValueError, match="must be that of the adapter in out"):
        check_trained_config(config, replace(config, **{name: other}), "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mote": {"expert_wieght": 0.5}}, r"expert_wieght\s+Extra inputs are not permitted"),
        ({"mote": {"step_dropout": 3}}, r"mote\.step_dropout must be in \[0, 1\]"),
        ({"lora_qkv_kernel": True}, "lora_qkv_kernel must not be set with adapter: mote"),
        ({"peft_use_dora": True}, "peft_use_dora must not be set with adapter: mote"),
    ],
)
def test_axolotl_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validated(config(datasets=[CHAINS], **changes))


def test_a_foreign_configuration_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from accelerate.state import PartialState
    from torch import nn

    from axolotl_mote.training.plugin import MotePlugin

    monkeypatch.setenv("WORLD_SIZE", "2")
    broken = tmp_path / "broken.jsonl"
    broken.write_text("not JSON\n")
    prepare = PartialState._prepare_backend
    raw = {"adapter": "lora", "lora_r": 8, "datasets": [{"path": str(broken), "type": "alpaca"}]}
    before = copy.deepcopy(raw)
    plugin = MotePlugin()
    plugin.register(raw)
    assert raw == before
    assert PartialState._prepare_backend is prepare

    cfg = validated({"adapter": "lora", "lora_r": 8, "lora_target_linear": True, "datasets": [TEXT]})
    assert cfg.special_tokens is None
    model = nn.Module()
    model.get_input_embeddings = lambda: nn.Embedding(4, 2)  # type: ignore[assignment]
    plugin.load_datasets(cfg)
    plugin.post_model_build(cfg, model)
    assert plugin.get_lora_config_kwargs(cfg) == {}
    assert plugin.load_adapter(model, cfg) is None
    assert plugin.get_trainer_cls(cfg) is None


def test_a_full_fine_tune_is_left_alone() -> None:
    from axolotl_mote.training.plugin import MotePlugin

    plugin = MotePlugin()
    cfg = validated({"datasets": [TEXT]})
    assert plugin.get_trainer_cls(cfg) is None
    assert plugin.get_lora_config_kwargs(cfg) == {}
