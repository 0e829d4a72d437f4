"""Values and texts are no template: what is fixed in one comes out as it is, and rows reach a data set unchanged."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fuzz_kit import KINDS, STYLES, cases, dialect
from fuzz_texts import chains, dialogues, hostile
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from axolotl_mote.chain.templates import fix_variables, open_block
from axolotl_mote.training.dataset import encode_dataset

TEXT = hostile() | st.text(st.characters(), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers has it


@cases(60)
@given(VALUES, st.sampled_from(["", " ", "\n", "{#- c -#}"]))
def test_a_value_fixed_in_a_template_is_that_value(value: Any, first: str) -> None:
    template = first + "{{ keep(x) }}"
    found: list[Any] = []
    ENVIRONMENT.from_string(fix_variables(template, {"x": value})).render(keep=found.append, x="other")
    assert found == [value]
    assert fix_variables(fix_variables(template, {"x": value}), {"x": value}) == fix_variables(template, {"x": value})


@cases(20)
@given(st.sampled_from([math.nan, math.inf, b"x", {1}, object()]), st.lists(TEXT, max_size=2))
def test_a_value_that_no_template_can_spell_is_a_value_error(value: Any, beside: list[str]) -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs must hold null"):
        fix_variables("{{ x }}", {"x": [*beside, value]})


@pytest.mark.parametrize("style", STYLES)
def test_no_template_of_the_kit_leaves_a_block_open(style: str) -> None:
    assert open_block(dialect("byte_bpe", style).codec.tokenizer) is None


@cases(4)
@given(st.sampled_from(list(KINDS)), st.sampled_from(list(STYLES)), st.data())
def test_a_data_set_is_encoded_row_by_row(kind: str, style: str, data: st.DataObject) -> None:
    datasets = pytest.importorskip("datasets")
    made = dialect(kind, style)
    empty = dict.fromkeys(made.codec.steps)
    rows = [
        {"id": str(number), "messages": data.draw(dialogues(made)), **empty, **data.draw(chains(made))}
        for number in range(3)
    ]
    encoded = encode_dataset(datasets.Dataset.from_list(rows), made.codec, 1 << 20, keep_in_memory=True)
    assert encoded.to_list() == [made.codec.encode_chain(row) for row in rows]
