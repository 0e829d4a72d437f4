"""Reasoning and answer of a generation: ids make the structure, the server's text says what is shown."""

from __future__ import annotations

import random

import pytest
from kit import tiny_tokenizer

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.serving.reasoning import ChainSplitter, split_chain

CODEC = ChainCodec.from_tokenizer(tiny_tokenizer(("analysis", "guidance", "response", "check")))
SPELLED = {token: CODEC.tokenizer.decode([token]) for token in CODEC.special_ids}


def splitter() -> ChainSplitter:
    return ChainSplitter(CODEC.vocabulary, SPELLED, lambda ids: CODEC.tokenizer.decode(ids, skip_special_tokens=False))


def tokens_of(**steps: str) -> list[int]:
    """Token ids of a chain; `between` and `after` stand outside of every step, `open` names a step without its end."""
    left_open, ids = steps.pop("open", None), []
    for name, text in steps.items():
        inside = CODEC.encode_text(text)
        if name in CODEC.steps:
            number = CODEC.vocabulary.step_id(name) - 1
            inside = [CODEC.vocabulary.start_ids[number], *inside]
            inside += [] if name == left_open else [CODEC.vocabulary.end_ids[number]]
        ids += inside
    return ids


def text_of(ids: list[int]) -> str:
    return CODEC.tokenizer.decode(ids, skip_special_tokens=False)


CASES = [
    (
        tokens_of(analysis="It is harmless.", guidance="Say so.", response="Use kill."),
        "It is harmless.\n\nSay so.",
        "Use kill.",
    ),
    (tokens_of(response="Use kill."), "", "Use kill."),
    (tokens_of(analysis="Über 5 €, 日本", response="é日"), "Über 5 €, 日本", "é日"),
    (tokens_of(analysis="so", response="yes", check="safe"), "so", "yes"),
    (tokens_of(analysis="so", open="analysis"), "so", ""),
    (tokens_of(analysis="so", response="ye", open="response"), "so", "ye"),
    (tokens_of(analysis="so", between=" x ", response="yes", after=" y"), "so", "yes"),
    (tokens_of(between="a plain model"), "", "a plain model"),
    (
        tokens_of(analysis="say <|response|> and <|/analysis|> now", response="<|analysis|>"),
        "say <|response|> and <|/analysis|> now",
        "<|analysis|>",
    ),
    ([], "", ""),
]


@pytest.mark.parametrize(("ids", "reasoning", "answer"), CASES)
def test_in_one_piece(ids, reasoning, answer):
    assert split_chain(splitter(), text_of(ids), ids) == (reasoning, answer)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("ids", "reasoning", "answer"), CASES)
def test_streamed_in_any_pieces_nothing_is_lost_or_doubled(ids, reasoning, answer, seed):
    """Text may lag behind the tokens: characters that are not complete, and what could become a stop string."""
    draw, follow = random.Random(seed), splitter()
    shown, order = {False: "", True: ""}, []
    begin = seen = 0
    while begin < len(ids):
        end = draw.randint(begin + 1, min(len(ids), begin + 1 + seed % 9))
        ready = text_of(ids[:end]).rstrip("\ufffd")
        seen = max(seen, len(ready) if end == len(ids) else draw.randint(max(0, len(ready) - 12), len(ready)))
        for piece in follow.feed(ready[:seen], ids[begin:end]):
            shown[piece.is_answer] += piece.text
            order.append(piece.is_answer)
        begin = end
    assert (shown[False], shown[True]) == (reasoning, answer)
    assert order == sorted(order)


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_stop_string_may_cut_the_text_anywhere(cut):
    """The tokens of what was cut are there; the text is not."""
    ids = tokens_of(analysis="It is harmless.", response="Use kill.")
    text = text_of(ids)[:cut]
    reasoning, answer = split_chain(splitter(), text, ids)
    start, end, opened = ("<|analysis|>", "<|/analysis|>", "<|response|>")
    inside = text.partition(start)[2]
    before, closed, rest = inside.partition(end)
    if closed:
        assert (reasoning, answer) == (
            before,
            rest.partition(opened)[2].partition("<|/response|>")[0][: len("Use kill.")],
        )
    else:
        assert "It is harmless.".startswith(reasoning)
        assert answer == ""
