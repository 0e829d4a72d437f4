"""Any tokens at all: the parser reads them as the rule says, and everything that routes agrees."""

from __future__ import annotations

import re
from itertools import chain

import torch
from fuzz_kit import Dialect, cases, dialect
from hypothesis import given
from hypothesis import strategies as st
from kit import mote_config, naive_step_ids

from axolotl_mote.model.routing import step_ids_from_tokens
from axolotl_mote.serving.routes import Route, Scheduled

DIALECTS = [
    ("byte_bpe", "chatml"),
    ("sentencepiece_bpe", "llama2"),
    ("wordpiece", "gemma"),
    ("tekken", "think_rewrite"),
]


def tokens_of(made: Dialect, *, beyond: int = 0) -> st.SearchStrategy[list[int]]:
    """Steps in order or not, with or without something between them; or nothing but a soup of markers.

    Args:
        made: Whose tokens.
        beyond: How many ids behind the last token of the tokenizer: those that pad the output head.
    """
    vocabulary, count = made.codec.vocabulary, len(made.codec.steps)
    any_token = st.integers(0, len(made.codec.tokenizer) - 1 + beyond)
    inside = st.lists(any_token.filter(lambda token: token not in made.control), max_size=3)
    steps = st.permutations(range(count)) | st.lists(st.integers(0, count - 1), max_size=count).map(sorted)
    wholes = steps.flatmap(
        lambda chosen: st.tuples(
            *(inside.map(lambda ids, k=k: [vocabulary.start_ids[k], *ids, vocabulary.end_ids[k]]) for k in chosen)
        )
    )
    tails = st.lists(st.sampled_from(sorted(made.control)) | any_token, max_size=2)
    soup = st.lists(st.sampled_from(vocabulary.marker_ids) | any_token, max_size=14)
    return st.tuples(wholes, st.just([]) | tails).map(lambda drawn: list(chain(*drawn[0], drawn[1]))) | soup


@cases(100)
@given(st.sampled_from(DIALECTS), st.data())
def test_the_parser_reads_any_tokens(names: tuple[str, str], data: st.DataObject) -> None:
    """A chain is valid if and only if a regular expression over kinds of tokens says so."""
    made = dialect(*names)
    codec, vocabulary = made.codec, made.codec.vocabulary
    ids = data.draw(tokens_of(made, beyond=1000))
    parsed = codec.parse(ids)
    assert list(parsed.token_ids) == ids[: len(parsed.token_ids)]
    stop = next((n for n, token in enumerate(ids) if token in (codec.stop_id, codec.pad_id)), len(ids))
    letters = "".join(
        "t" if not (kind := vocabulary.kinds.get(token, 0)) else chr(65 + kind) if kind > 0 else chr(96 - kind)
        for token in ids[:stop]
    ).replace("t", ".")
    steps = [rf"{chr(65 + k)}\.*{chr(96 + k)}" for k in range(1, len(codec.steps) + 1)]
    answer = vocabulary.step_id(vocabulary.answer)
    rule = "".join(step if k == answer else f"(?:{step})?" for k, step in enumerate(steps, 1))
    cut = len(codec.end_of_turn) > 1  # text may end the turn
    assert cut or parsed.valid == bool(re.fullmatch(rule, letters))
    if parsed.valid:
        routed = vocabulary.step_ids(parsed.token_ids)
        assert parsed.token_counts == {name: routed.count(vocabulary.step_id(name)) - 2 for name in parsed.steps}
        assert parsed.truncated == ()
    assert parsed.finished <= parsed.valid
    assert sum(parsed.token_counts.values()) <= parsed.spent <= len(ids)
    codec.stretches(ids)
    codec.parse(ids, must_close=lambda *_: True, expect_check=True)


def cuts_of(ids: list[int], kinds: dict[int, int]) -> st.SearchStrategy[int]:
    """A place to cut ids at; most often behind a marker."""
    behind = [n + 1 for n, token in enumerate(ids[:-1]) if token in kinds]
    anywhere = st.integers(0, len(ids) - 1)
    return st.sampled_from(behind) | anywhere if behind else anywhere


@cases(60)
@given(st.data())
def test_everything_that_routes_agrees(data: st.DataObject) -> None:
    """Plain Python, padded and packed tensors, and a server's tokens in any parts, against an independent rule."""
    made = dialect("byte_bpe", "chatml")
    vocabulary = made.codec.vocabulary
    config = mote_config(steps=list(made.codec.steps), marker_ids=vocabulary.marker_ids)
    texts = data.draw(st.lists(tokens_of(made).filter(bool), min_size=1, max_size=4))
    wanted = [naive_step_ids(ids, config) for ids in texts]
    assert [vocabulary.step_ids(ids) for ids in texts] == wanted

    width = max(map(len, texts))
    padded = torch.tensor([[made.codec.pad_id] * (width - len(ids)) + ids for ids in texts])
    assert step_ids_from_tokens(padded, config).tolist() == [[0] * (width - len(s)) + s for s in wanted]

    packed = torch.tensor([[token for ids in texts for token in ids]])
    positions = torch.tensor([[n for ids in texts for n in range(len(ids))]])
    if all(len(ids) > 1 for ids in texts):  # a jump marks a document
        assert step_ids_from_tokens(packed, vocabulary, positions)[0].tolist() == list(chain(*wanted))

    route = Route.from_config(config)
    cuts = [data.draw(cuts_of(ids, vocabulary.kinds)) for ids in texts]
    carry = [
        int(route.after(torch.tensor(ids[:cut]), torch.tensor(steps[:cut]))[-1]) if cut else 0
        for ids, steps, cut in zip(texts, wanted, cuts, strict=True)
    ]
    parts = [ids[cut:] for ids, cut in zip(texts, cuts, strict=True)]
    first = [sum(map(len, parts[:n])) for n in range(len(parts))]
    request = [n for n, part in enumerate(parts) for _ in part]
    scheduled = Scheduled(*(torch.tensor(values) for values in (list(chain(*parts)), first, request, carry)))
    assert scheduled.steps(route).tolist() == list(
        chain(*(steps[cut:] for steps, cut in zip(wanted, cuts, strict=True)))
    )
