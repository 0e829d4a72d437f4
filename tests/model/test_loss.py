"""The loss of every token against its definition, and its chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kit import FAMILIES, MARKER_IDS, SIZE, chain, mote
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from axolotl_mote.model import loss as loss_module
from axolotl_mote.model.loss import (
    build_targets,
    chunk_size,
    scored_positions,
    shift,
    step_sums,
    token_losses,
    token_weights,
    weighted_loss,
)

# What each of them does to its logits has another name, or another meaning of a name that others use too.
OWN_LOGITS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 5.0},
    "hyperclovax": {"logits_scaling": 5.0},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},  # its forward calls model.decoder
}


def test_shift_moves_targets_under_their_predictors() -> None:
    assert shift(torch.tensor([[1, 2, 3]]), -100).tolist() == [[2, 3, -100]]


def test_weights_come_from_the_targets_step() -> None:
    targets = torch.tensor([[5, -100, 7, 8]])
    weights = token_weights(targets, torch.tensor([[1, 1, 2, 0]]), [1.0, 0.5, 3.0])
    assert weights.tolist() == [[0.5, 0.0, 3.0, 1.0]]


def test_targets_are_labels_steps_and_weights_of_the_next_token() -> None:
    targets = build_targets(torch.tensor([[-100, 5, 6]]), torch.tensor([[0, 1, 2]]), [1.0, 0.5, 3.0])
    assert targets.ids.tolist() == [[5, 6, -100]]
    assert targets.steps.tolist() == [[1, 2, 0]]
    assert targets.weights.tolist() == [[0.5, 3.0, 0.0]]


@pytest.mark.parametrize("chunked", [False, True])
def test_chunks_change_neither_loss_nor_gradient(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        monkeypatch.setattr(loss_module, "chunk_size", lambda vocab_size: 256)
    torch.manual_seed(0)
    hidden = torch.randn(3, 301, 16, requires_grad=True)
    head = nn.Linear(16, 50)
    targets = torch.randint(0, 50, (3, 301))
    targets[:, :100] = -100
    losses = token_losses(hidden, targets, head, 50)
    expected = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="none").view(3, 301)
    assert torch.allclose(losses, expected, atol=1e-6)
    gradient = torch.autograd.grad(losses.sum(), [hidden, head.weight])
    exact = torch.autograd.grad(expected.sum(), [hidden, head.weight])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradient, exact, strict=True))


@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 262_144, 500_000])
def test_a_chunk_holds_at_most_half_a_gib_of_logits(vocabulary: int) -> None:
    assert 2**28 < chunk_size(vocabulary) * vocabulary * 4 <= 2**29


def test_chunks_stay_worth_a_call_however_large_the_vocabulary() -> None:
    assert chunk_size(10**9) >= 256


def one_batch() -> tuple[Tensor, Tensor]:
    ids = torch.tensor([chain(), chain(seed=2)])
    return ids, shift(ids, -100)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
@pytest.mark.parametrize("beyond", [True, False])
def test_a_held_head_is_gathered_once_and_changes_nothing(
    family: str, beyond: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 weights can be read only while they are gathered; here they are empty outside of that block."""
    monkeypatch.setattr(loss_module, "chunk_size", lambda vocab_size: 8)
    ids, targets = one_batch()
    markers = {} if beyond else {"marker_ids": list(range(10, 16))}
    if not beyond:
        ids, targets = (torch.where(tokens >= MARKER_IDS[0], tokens - 86, tokens) for tokens in (ids, targets))
    expected, model = gradients(mote(family, **markers), ids, targets), mote(family, **markers)
    head = model.get_output_embeddings()
    partition, table, gathers, calls = head.base_layer.weight, head.base_layer.weight.data, [], []

    @contextmanager
    def gathered(parameter: Tensor) -> Iterator[None]:
        assert parameter is partition
        gathers.append(1)
        parameter.data = table
        yield
        parameter.data = torch.empty(0)

    model.base_model.gathered = gathered
    model.get_decoder().register_forward_hook(lambda *_: setattr(partition, "data", torch.empty(0)))
    for layer in (head, head.base_layer, *head.lora_marker_rows.values()):
        layer.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, ids, targets)
    assert len(gathers) == 1
    assert len(calls) == len(head.lora_marker_rows)  # nothing but the rows, once
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5), name


def test_a_repeated_chunk_keeps_other_threads_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backward pass too, a stand-in is where the decoder belongs."""
    monkeypatch.setattr(loss_module, "chunk_size", lambda vocab_size: 8)
    model, (ids, targets) = mote(), one_batch()
    decoder, taken = model.get_decoder(), []

    def turn() -> AbstractContextManager[object]:
        assert model.get_decoder() is decoder
        taken.append(1)
        return nullcontext()

    losses = model(input_ids=ids, targets=targets).loss
    monkeypatch.setattr(model.base_model.routing, "turn", turn)
    losses.sum().backward()
    assert taken == []  # the path took the method that was there before
    losses = model(input_ids=ids, targets=targets).loss
    before = len(taken)
    losses.sum().backward()
    assert len(taken) - before == -(-ids.numel() // 8)


def gradients(model: Any, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Losses, and the gradient of their sum by name."""
    losses = model(input_ids=ids, targets=targets).loss
    losses.sum().backward()
    return {"losses": losses.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *OWN_LOGITS])
def test_token_losses_equal_those_of_the_models_own_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for models that do something to their logits, such as Gemma 2's soft-capping."""
    if family in OWN_LOGITS:
        config = CONFIG_MAPPING[family](**SIZE, **OWN_LOGITS[family])
        monkeypatch.setitem(FAMILIES, family, config)
    model = mote(family, "eager", target_modules=["q_proj"] if family in OWN_LOGITS else "all-linear")
    ids, targets = one_batch()
    logits = model(input_ids=ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    assert torch.allclose(model(input_ids=ids, targets=targets).loss, expected, atol=1e-5)


@given(st.data())
def test_scored_tokens_are_those_whose_next_token_has_a_label(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    flags = data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows))
    multiple = data.draw(st.sampled_from([1, 4, 64]))
    labels = torch.where(torch.tensor(flags), 7, -100)
    found = scored_positions(labels, multiple).tolist()
    expected = [row * length + column for row in range(rows) for column in range(length - 1) if flags[row][column + 1]]
    assert len(found) == max(multiple, -(-len(expected) // multiple) * multiple)
    assert found == expected + [rows * length - 1] * (len(found) - len(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_on_scored_tokens_changes_neither_loss_nor_gradient(family: str) -> None:
    ids = torch.tensor([chain(), chain(seed=2)])
    labels = ids.clone()
    labels[:, :9] = labels[0, 15:20] = -100
    targets, scored = shift(labels, -100), scored_positions(labels, 1)
    assert len(scored) == 27  # of 50
    results = []
    for columns in (None, scored):
        model = mote(family)
        rows: list[int] = []
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda _, args, __, rows=rows: rows.append(args[0].shape[:-1].numel()))
        losses = model(input_ids=ids, targets=targets, scored=columns).loss
        losses.sum().backward()
        results.append((losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        assert rows == [50 if columns is None else 27]
    (plain, gradients), (fewer, same) = results
    assert torch.allclose(plain, fewer, atol=1e-6)
    assert gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, same[name], atol=1e-5, rtol=1e-4), name


def test_the_loss_is_the_weighted_mean_of_a_batch_alone_or_its_share_of_all() -> None:
    losses, weights = torch.tensor([[2.0, 4.0, 9.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    assert float(weighted_loss(losses, weights)) == pytest.approx(4 / 1.5)
    assert float(weighted_loss(losses, weights, torch.tensor(4.0), ranks=2)) == 2.0


def test_a_loss_without_weight_is_zero_with_a_gradient() -> None:
    losses = torch.ones(1, 3, requires_grad=True)
    loss = weighted_loss(losses, torch.zeros(1, 3))
    loss.backward()
    assert float(loss) == 0.0
    assert losses.grad is not None
    assert torch.equal(losses.grad, torch.zeros(1, 3))


def test_step_sums() -> None:
    sums = step_sums(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 2, 2]]), 3)
    assert sums.tolist() == [1.0, 0.0, 6.0, 0.0]
