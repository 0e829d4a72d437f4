"""Step ids, gates, draws and positions against slow references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import MARKER_IDS, STEPS, VOCABULARY, chain, mote_config

from axolotl_mote.chain.vocabulary import advance
from axolotl_mote.model.routing import (
    document_draws,
    document_starts,
    draw_question_step,
    dropped_tokens,
    gate_table,
    marker_kinds,
    positions_without_dropped,
    step_ids_from_kinds,
    step_ids_from_tokens,
)

VOCABULARY_OF = mote_config().vocabulary
TOKENS = st.sampled_from([5, 6, *MARKER_IDS])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(TOKENS, min_size=1, max_size=15), min_size=1, max_size=4))
def test_step_ids_equal_the_rule_of_the_language_in_packed_documents(documents: list[list[int]]) -> None:
    tokens = torch.tensor([[token for document in documents for token in document]])
    positions = torch.tensor([[position for document in documents for position in range(len(document))]])
    expected = [step for document in documents for step in VOCABULARY_OF.step_ids(document)]
    assert step_ids_from_tokens(tokens, VOCABULARY_OF, positions)[0].tolist() == expected
    assert step_ids_from_tokens(tokens.expand(2, -1), mote_config(), positions).tolist() == [expected] * 2
    starts = document_starts(tokens, positions)
    assert step_ids_from_kinds(marker_kinds(tokens, VOCABULARY_OF), starts)[0].tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.integers(1, 5))
def test_step_ids_equal_the_rule_for_any_number_of_steps(kinds: list[int], num_steps: int) -> None:
    kinds = [kind if abs(kind) <= num_steps else 0 for kind in kinds]
    open_step, expected = 0, []
    for kind in kinds:
        step, open_step = advance(open_step, kind)
        expected.append(step)
    assert step_ids_from_kinds(torch.tensor([kinds]))[0].tolist() == expected


def test_step_ids_of_examples() -> None:
    a, a_end, _, g_end, r, r_end = MARKER_IDS
    cases = {
        (5, a, 6, a_end, r, 7, r_end, 2): [0, 1, 1, 1, 3, 3, 3, 0],
        (5, a, 6, r, 7): [0, 1, 1, 3, 3],  # no end marker: until the next start
        (5, a, 6, g_end, 7): [0, 1, 1, 1, 1],  # a foreign end marker closes nothing
        (5, a_end, r, 7, r_end, r_end, 8): [0, 0, 3, 3, 3, 0, 0],  # end markers outside a step are question
    }
    for tokens, expected in cases.items():
        assert step_ids_from_tokens(torch.tensor([tokens]), mote_config())[0].tolist() == expected


def test_a_document_start_ends_an_open_step() -> None:
    tokens = torch.tensor([[5, MARKER_IDS[0], 6, 7, 8]])
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    assert step_ids_from_tokens(tokens, mote_config(), positions)[0].tolist() == [0, 1, 1, 0, 0]
    assert document_starts(tokens, positions)[0].tolist() == [0, 0, 0, 3, 3]


def test_gate_table_weights_the_blocks() -> None:
    config = mote_config(steps=["analysis", "response"], marker_ids=MARKER_IDS[:4], r=1, lora_alpha=1)
    expected = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]])
    assert torch.equal(gate_table(config), expected)
    config.question_routing = "shared"
    assert torch.equal(gate_table(config)[0], torch.tensor([0.0, 0.0, 0.5]))
    wide = gate_table(mote_config(r=2, lora_alpha=6, expert_weight=0.75))
    assert wide[2].tolist() == pytest.approx([0, 0, 2.25, 2.25, 0, 0, 0.75, 0.75])


def draws_of(rows: list[list[int]], step: int = 0, seed: int = 0) -> torch.Tensor:
    ids = torch.tensor(rows)
    return document_draws(ids, document_starts(ids), None, seed=seed, step=step, num_draws=3)


def test_draws_do_not_depend_on_batching_padding_or_packing() -> None:
    first, second = chain(seed=1), chain(question=9, seed=2)
    alone = {tuple(row): draws_of([row])[:, 0, 0] for row in (first, second)}
    # left and right padding in one batch
    length = max(len(first), len(second)) + 3
    ids = torch.zeros(2, length, dtype=torch.long)
    valid = torch.zeros(2, length, dtype=torch.bool)
    ids[0, length - len(first) :], valid[0, length - len(first) :] = torch.tensor(first), True
    ids[1, : len(second)], valid[1, : len(second)] = torch.tensor(second), True
    draws = document_draws(ids, document_starts(ids), valid, seed=0, step=0, num_draws=3)
    assert torch.equal(draws[:, 0, -1], alone[tuple(first)])
    assert torch.equal(draws[:, 1, 0], alone[tuple(second)])
    # packed into one row
    packed = torch.tensor([first + second])
    positions = torch.tensor([[*range(len(first)), *range(len(second))]])
    draws = document_draws(packed, document_starts(packed, positions), None, seed=0, step=0, num_draws=3)
    assert torch.equal(draws[:, 0, 0], alone[tuple(first)])
    assert torch.equal(draws[:, 0, -1], alone[tuple(second)])
    assert (draws == draws[:, :, :1])[:, :, : len(first)].all()  # constant within a document


def test_draws_are_uniform_and_change_with_step_seed_and_content() -> None:
    rows = torch.randint(3, VOCABULARY, (4000, 12), generator=torch.Generator().manual_seed(0)).tolist()
    draws = draws_of(rows)[:, :, 0]
    assert draws.min() >= 0
    assert draws.max() < 1
    for draw in draws:
        histogram = torch.histc(draw, 10, 0, 1)
        assert (histogram - 400).abs().max() < 80  # 4 standard deviations of a fair draw
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.08
    for other in (draws_of(rows, step=1), draws_of(rows, seed=1)):
        pair = torch.stack([draws[0], other[0, :, 0]])
        assert torch.corrcoef(pair)[0, 1].abs() < 0.08
    swapped = [[row[1], row[0], *row[2:]] for row in rows[:100]]
    assert (draws_of(swapped)[0, :, 0] == draws[0, :100]).float().mean() < 0.1


def test_question_step_draws_cover_all_steps_evenly() -> None:
    steps = draw_question_step(torch.linspace(0, 0.999999, 3000), len(STEPS))
    assert torch.bincount(steps).tolist() == [0, 1000, 1000, 1000]


def test_dropped_steps_follow_their_probability() -> None:
    step_ids = torch.tensor([[0, 1, 1, 2, 3]])
    draws = torch.tensor([[[0.2] * 5], [[0.6] * 5]])
    assert dropped_tokens(step_ids, draws, [0.3, 0.5])[0].tolist() == [False, True, True, False, False]
    assert not dropped_tokens(step_ids, draws, [0.0, 0.0]).any()
    assert dropped_tokens(step_ids, draws, [1.0, 1.0])[0].tolist() == [False, True, True, True, False]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3), st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=3))
def test_positions_count_the_visible_tokens(dropped_mask: int, sizes: list[tuple[int, int, int, int]]) -> None:
    tokens, positions = [], []
    for number, (question, *steps) in enumerate(sizes):
        row = chain(question + 1, *steps, seed=number)
        tokens += row
        positions += range(len(row))
    ids = torch.tensor([tokens])
    documents = document_starts(ids, torch.tensor([positions]))
    steps = step_ids_from_tokens(ids, mote_config(), torch.tensor([positions]))
    dropped = torch.zeros_like(steps, dtype=torch.bool)
    for step in (1, 2):
        if dropped_mask & step:
            dropped |= steps == step
    found = positions_without_dropped(steps, dropped, documents, 3)[0].tolist()
    for t in range(len(tokens)):
        seen = [
            u
            for u in range(t)
            if documents[0, u] == documents[0, t] and (not dropped[0, u] or steps[0, u] == steps[0, t])
        ]
        assert found[t] == len(seen)
