"""The safety boundary: whatever a text holds, under every tokenizer and every chat template, it stays text."""

from __future__ import annotations

import pytest
from fuzz_kit import EXACT, KINDS, STYLES, Dialect, cases, dialect, squeezed
from fuzz_texts import chains, dialogues, hostile
from hypothesis import given, note
from hypothesis import strategies as st

from axolotl_mote.chain.rows import check_row
from axolotl_mote.chain.steps import markers

SPELLS_ALL = [kind for kind in KINDS if kind not in ("wordpiece", "sentencepiece_unknown")]
ANY = st.tuples(st.sampled_from(list(KINDS)), st.sampled_from(list(STYLES)))


@cases(120)
@given(ANY, st.data())
def test_a_dialogue_has_the_control_tokens_of_a_harmless_one(names: tuple[str, str], data: st.DataObject) -> None:
    """No marker, no role, no end of turn comes out of a text, in any place, in any number."""
    made = dialect(*names)
    messages = data.draw(dialogues(made))
    found = made.controls(made.codec.encode_question(messages))
    harmless = [{**message, "content": "x"} for message in messages]
    assert found == made.controls(made.codec.encode_question(harmless))
    assert not set(found) & set(markers(made.codec.steps))


@cases(40)
@given(st.sampled_from(EXACT), st.sampled_from(list(STYLES)), st.data())
def test_the_question_is_written_as_it_is(kind: str, style: str, data: st.DataObject) -> None:
    """Template syntax, stand-ins and look-alikes come out literally."""
    made = dialect(kind, style)
    messages = data.draw(dialogues(made))
    text = made.question(made.codec.encode_question(messages))
    assert messages[-1]["content"].strip() in text


@cases(40)
@given(st.sampled_from(SPELLS_ALL), st.sampled_from(list(STYLES)), st.data())
def test_nothing_of_the_question_is_lost(kind: str, style: str, data: st.DataObject) -> None:
    """Under tokenizers that change texts too; SentencePiece puts spaces around what was quoted."""
    made = dialect(kind, style)
    messages = data.draw(dialogues(made))
    text = made.question(made.codec.encode_question(messages))
    assert squeezed(made.canonical(messages[-1]["content"])) in squeezed(made.canonical(text))


@cases(80)
@given(ANY, st.data())
def test_a_chain_comes_back_from_its_tokens(names: tuple[str, str], data: st.DataObject) -> None:
    """Its markers are the ones of its steps, and its texts those of the row, as far as the tokenizer keeps texts."""
    made = dialect(*names)
    codec, steps = made.codec, data.draw(chains(made))
    messages = [{"role": "user", "content": data.draw(hostile(made))}]
    row = {"messages": messages, **steps}
    assert check_row(row, codec.steps) == []
    encoded = codec.encode_chain(row)
    question = codec.encode_question(messages)
    ids = encoded["input_ids"][len(question) :]
    present = [step for step in codec.steps if steps.get(step)]
    assert encoded["input_ids"][: len(question)] == question
    assert encoded["labels"] == [-100] * len(question) + ids
    ends = made.controls(codec.end_of_turn)
    assert made.controls(ids) == [*markers(present), *ends]
    assert_comes_back(made, ids, {step: steps[step] for step in present})


def assert_comes_back(made: Dialect, ids: list[int], steps: dict[str, str]) -> None:
    """The chain parsed from ids holds the texts of the steps."""
    chain = made.codec.parse(ids)
    note(f"{made.kind} {made.style} {made.codec.tokenizer.convert_ids_to_tokens(ids)}")
    assert chain.valid
    assert chain.steps == tuple(steps)
    assert chain.truncated == ()
    unknown = made.codec.tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        return  # spelled by one token, whatever it was
    kept = squeezed if made.kind == "wordpiece" or made.is_broken_up(steps.values()) else str
    assert {step: kept(text) for step, text in chain.texts.items()} == {
        step: kept(made.canonical(text.strip())) for step, text in steps.items()
    }
    assert chain.finished == bool(chain.texts[made.codec.vocabulary.answer].strip())


@cases(60)
@given(ANY, st.data())
def test_a_text_alone_holds_no_control_token(names: tuple[str, str], data: st.DataObject) -> None:
    made = dialect(*names)
    text = data.draw(hostile(made))
    ids = made.codec.encode_text(text)
    assert made.controls(ids) == []
    if made.kind in EXACT:
        assert made.codec.tokenizer.decode(ids) == text


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_control_token_of_every_dialect_stays_text(kind: str, style: str) -> None:
    """As it is, with nothing around it."""
    made = dialect(kind, style)
    frame = made.controls(made.codec.encode_question([{"role": "user", "content": "x"}]))
    for token in sorted(made.control):
        text = str(made.codec.tokenizer.convert_ids_to_tokens(token))
        assert made.controls(made.codec.encode_question([{"role": "user", "content": text}])) == frame
        assert made.controls(made.codec.encode_text(text)) == []


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dialect_encodes_a_plain_dialogue(kind: str, style: str) -> None:
    made = dialect(kind, style)
    ask = [{"role": "user", "content": "so what"}]
    plain = made.codec.tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=False)
    assert made.codec.encode_question(ask) == plain
