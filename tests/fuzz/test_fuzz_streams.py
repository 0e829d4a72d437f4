"""However a stream of tokens is cut, what is shown is the text of the chain in one piece."""

from __future__ import annotations

import torch
from fuzz_kit import EXACT, KINDS, STYLES, Dialect, cases, dialect
from fuzz_texts import chains
from hypothesis import given, note
from hypothesis import strategies as st

from axolotl_mote.chain.steps import CHECK
from axolotl_mote.generation.streamer import StepStreamer
from axolotl_mote.serving.reasoning import BETWEEN_STEPS, ChainSplitter, split_chain

ANY = st.tuples(st.sampled_from(list(KINDS)), st.sampled_from(list(STYLES)))
QUESTION = [{"role": "user", "content": "x"}]


@st.composite
def chunks(draw: st.DrawFn, count: int) -> list[tuple[int, int]]:
    """Where a stream of that many tokens is cut."""
    cuts = sorted(draw(st.sets(st.integers(1, max(count - 1, 1)), max_size=12)))
    return list(zip([0, *cuts], [*cuts, count], strict=True))


def generated(made: Dialect, row: dict[str, str]) -> list[int]:
    """What a model generates that has learned a row."""
    ids = made.codec.encode_chain({"messages": QUESTION, **row})["input_ids"]
    return ids[len(made.codec.encode_question(QUESTION)) :]


def streamed(made: Dialect, ids: list[int], cuts: list[tuple[int, int]]) -> list[tuple[str, str]]:
    """The steps that a streamer shows, in order, each with its text."""
    shown: list[tuple[str, str]] = []

    def on_text(step: str, piece: str) -> None:
        if not piece:
            shown.append((step, ""))
        else:
            assert shown[-1][0] == step
            shown[-1] = (step, shown[-1][1] + piece)

    streamer = StepStreamer(made.codec, on_text)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for begin, end in cuts:
        streamer.put(torch.tensor(ids[begin:end]))
    streamer.end()
    return shown


def in_one_piece(made: Dialect, ids: list[int]) -> list[tuple[str, str]]:
    """The steps in ids, as often as they are opened, each with the text of its tokens decoded at once."""
    found: list[tuple[str, list[int]]] = []
    opened = 0
    for token in ids:
        kind = made.codec.vocabulary.kinds.get(token, 0)
        if kind > 0:
            opened = kind
            found.append((made.codec.steps[kind - 1], []))
        elif opened and not kind:
            found[-1][1].append(token)
        elif kind == -opened:
            opened = 0
    return [(step, str(made.codec.tokenizer.decode(text))) for step, text in found]


@cases(40)
@given(ANY, st.data())
def test_a_streamed_chain_is_the_parsed_one(names: tuple[str, str], data: st.DataObject) -> None:
    made = dialect(*names)
    ids = generated(made, data.draw(chains(made, 4)))
    cuts = data.draw(chunks(len(ids)))
    assert dict(streamed(made, ids, cuts)) == made.codec.parse(ids).texts


def splitter(made: Dialect) -> ChainSplitter:
    decode = made.codec.tokenizer.decode
    spelled = {token: str(decode([token])) for token in made.codec.special_ids}
    return ChainSplitter(made.codec.vocabulary, spelled, lambda ids: str(decode(ids)))


def followed(made: Dialect, ids: list[int], cuts: list[tuple[int, int]], data: st.DataObject) -> tuple[str, str]:
    """Reasoning and answer of a stream whose text lags behind its tokens."""
    follow, seen, shown = splitter(made), 0, {False: "", True: ""}
    whole = str(made.codec.tokenizer.decode(ids))
    for begin, end in cuts:
        ready = str(made.codec.tokenizer.decode(ids[:end])).rstrip("\ufffd")
        if end == len(ids):
            ready = whole
        elif not whole.startswith(ready):  # of this a server shows nothing
            ready = ""
        lag = 0 if end == len(ids) else data.draw(st.integers(0, 12))
        seen = max(seen, len(ready) - lag)
        for piece in follow.feed(whole[:seen], ids[begin:end]):
            shown[piece.is_answer] += piece.text
    return shown[False], shown[True]


@cases(40)
@given(ANY, st.data())
def test_a_server_streams_what_it_returns_in_one_piece(names: tuple[str, str], data: st.DataObject) -> None:
    made = dialect(*names)
    ids = generated(made, data.draw(chains(made, 4)))
    note(f"{names} {made.codec.tokenizer.convert_ids_to_tokens(ids)}")
    whole = split_chain(splitter(made), str(made.codec.tokenizer.decode(ids)), ids)
    assert followed(made, ids, data.draw(chunks(len(ids))), data) == whole
    if made.codec.tokenizer.unk_token_id in ids:
        return  # a server shows no special token, and this one stands for a character
    chain = made.codec.parse(ids)
    reasoning = [text for step, text in chain.texts.items() if step not in (made.codec.vocabulary.answer, CHECK)]
    wanted = BETWEEN_STEPS.join(reasoning), chain.answer
    if made.kind in EXACT:
        assert whole == wanted
    else:  # decoders may write a space behind a marker
        assert tuple(map("".join, map(str.split, whole))) == tuple(map("".join, map(str.split, wanted)))


@cases(80)
@given(st.sampled_from(EXACT), st.sampled_from(list(STYLES)), st.data())
def test_any_tokens_are_streamed_as_in_one_piece(kind: str, style: str, data: st.DataObject) -> None:
    """Chains that break the rules too; these tokenizers have tokens for halves of characters."""
    made = dialect(kind, style)
    special = [*made.codec.vocabulary.marker_ids, made.codec.stop_id]
    text = st.integers(0, len(made.codec.tokenizer) - 1)
    token = st.sampled_from(special) | text | text
    ids = [made.codec.vocabulary.start_ids[0], *data.draw(st.lists(token, max_size=30))]
    pieces = [(0, len(ids))] if len(ids) < 2 else data.draw(chunks(len(ids)))
    assert streamed(made, ids, pieces) == in_one_piece(made, ids)
    whole = split_chain(splitter(made), str(made.codec.tokenizer.decode(ids)), ids)
    assert followed(made, ids, pieces, data) == whole
