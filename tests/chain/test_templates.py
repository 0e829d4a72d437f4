"""Variables fixed in a chat template, and blocks that its generation prompt leaves open."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from template_kit import ASK, STEPS, axolotl_templates, build_tokenizer, build_universal_tokenizer, row
from transformers import AutoTokenizer

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.templates import fix_variables, open_block, way_to_close

VALUES = {"text": 'a "quote" %} é 🙂\n\\', "no": False, "nothing": None, "many": [1, 2.5, {"k": True}]}


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    return build_tokenizer(smollm2_dir, "chatml")


@pytest.fixture(scope="module")
def universal(smollm2_dir: Path) -> Any:
    pytest.importorskip("axolotl")
    return build_universal_tokenizer(smollm2_dir)


def render(tokenizer: Any, template: str, **variables: Any) -> str:
    tokenizer.chat_template = template
    return str(tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True, **variables))


@pytest.mark.parametrize(
    "first",
    [
        "",
        "\n",
        "  ",
        "  \n",
        "  {% if true %}a{% endif %}",
        " \t{# a comment #}b",
        "\n  {% if true %}\n  a{% endif %}",
        "\r\n {% if true %}a{% endif %}",
        "{#- a comment -#}\n",
        "{%- macro m() %}{{ text }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_fixed_variable_is_as_a_given_one(tokenizer: Any, first: str) -> None:
    template = (
        first
        + "{{ text }}|{{ no is false }}|{{ nothing is none }}|{{ many }}|{% for m in messages %}{{ no }}{% endfor %}"
    )
    fixed = fix_variables(template, VALUES)
    assert render(tokenizer, fixed) == render(tokenizer, template, **VALUES)
    assert render(tokenizer, fixed, no=True) == render(tokenizer, fixed)  # what the adapter was trained with
    assert fix_variables(fixed, VALUES) == fixed


@pytest.mark.parametrize("name", ["enable_thinkng", "messages", "add_generation_prompt", "no-name"])
def test_a_variable_that_the_template_does_not_read_is_refused(name: str) -> None:
    template = "{{ messages }}{% if add_generation_prompt and enable_thinking is not false %}no-name{% endif %}"
    with pytest.raises(
        ValueError, match=f"must name variables of the chat template, such as enable_thinking; got '{name}'"
    ):
        fix_variables(template, {name: False})


def test_only_a_block_that_stays_open_counts(tokenizer: Any) -> None:
    for prompt, tag in {
        "<a>": "<a>",
        "<a>x</a>": None,
        "<a></a><b>": "<b>",
        "[THINK]\n": "[THINK]",
        "[/INST]": None,
        "<|im_start|>assistant\n": None,
        "<x:y>\n</x:z>": "<x:y>",
        "a < b > c [0]": None,
    }.items():
        tokenizer.chat_template = (
            "<sys>{{ messages[0].content }}{% if add_generation_prompt %}" + prompt + "{% endif %}"
        )
        assert open_block(tokenizer) == tag, prompt


def test_the_blocks_that_axolotls_templates_leave_open(universal: Any) -> None:
    open_ones = {}
    for name, universal.chat_template in axolotl_templates().items():
        if tag := open_block(universal):
            open_ones[name] = (tag, way_to_close(universal))
            universal.chat_template = fix_variables(universal.chat_template, way_to_close(universal) or {})
            assert open_block(universal) is None
    assert open_ones == dict.fromkeys(["qwen3", "qwen3_5"], ("<think>", {"enable_thinking": False}))


def test_no_variable_closes_a_block_that_is_always_open(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<t>{% endif %}"
    )
    assert way_to_close(tokenizer) is None


def test_a_saved_tokenizer_renders_the_prompt_of_training(universal: Any, tmp_path: Path) -> None:
    """Under each of axolotl's templates; those that can leave a block out or close it do."""
    dialogue = [*ASK, {"role": "assistant", "content": "Which one?"}, {"role": "user", "content": "Number 4."}]
    universal.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for name, template in axolotl_templates().items():
        universal.chat_template = template
        if open_block(universal):
            universal.chat_template = fix_variables(template, way_to_close(universal) or {})
        trained = ChainCodec(universal, STEPS).encode_chain(row(messages=dialogue))
        question = [token for token, label in zip(trained["input_ids"], trained["labels"], strict=True) if label < 0]
        (tmp_path / "chat_template.jinja").write_text(universal.chat_template, "utf-8")
        loaded.chat_template = (tmp_path / "chat_template.jinja").read_text("utf-8")
        plain = loaded.apply_chat_template(dialogue, add_generation_prompt=True, return_dict=False)
        assert question == plain == ChainCodec(loaded, STEPS).encode_question(dialogue), name


@pytest.mark.parametrize("name", [1, "not", "namespace", "raise_exception"])
def test_a_name_that_cannot_be_a_variable_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs must name variables of the chat template"):
        fix_variables("{{ raise_exception(namespace(x=not 1)) }}", {name: True})


@pytest.mark.parametrize("value", [datetime.date(2024, 7, 26), float("nan"), b"x", [float("inf")]])
def test_a_value_that_jinja_cannot_spell_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs must hold null, booleans, finite numbers"):
        fix_variables("{{ x }}", {"x": value})
