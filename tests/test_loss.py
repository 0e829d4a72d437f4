"""The loss against its definition, its chunks, and the trainer's own count of items."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, MARKER_IDS, chain, mote, mote_config
from torch import nn

from axolotl_mote import loss as loss_module
from axolotl_mote.loss import shift, step_sums, token_losses, token_weights
from axolotl_mote.trainer import MoteTrainer


def test_shift_moves_targets_under_their_predictors() -> None:
    assert shift(torch.tensor([[1, 2, 3]]), -100).tolist() == [[2, 3, -100]]


def test_weights_come_from_the_targets_step() -> None:
    targets = torch.tensor([[5, -100, 7, 8]])
    weights = token_weights(targets, torch.tensor([[1, 1, 2, 0]]), [1.0, 0.5, 3.0])
    assert weights.tolist() == [[0.5, 0.0, 3.0, 1.0]]


@pytest.mark.parametrize("chunked", [False, True])
def test_chunks_change_neither_loss_nor_gradient(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 0)  # the smallest chunk, 256 tokens
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


def test_unchunked_the_head_is_called_once_whatever_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 0)
    torch.manual_seed(0)
    head, calls = nn.Linear(16, 50), []
    head.register_forward_hook(lambda *_: calls.append(1))
    for length in (2, 301, 700):
        hidden, targets = torch.randn(1, length, 16), torch.randint(0, 50, (1, length))
        calls.clear()
        losses = token_losses(hidden, targets, head, 50, chunked=False)
        assert len(calls) == 1
        assert torch.allclose(losses, token_losses(hidden, targets, head, 50), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_token_losses_equal_those_of_the_models_own_logits(family: str) -> None:
    """Also for models that do something to their logits, such as Gemma 2's soft-capping."""
    model = mote(family)
    ids = torch.tensor([chain(), chain(seed=2)])
    targets = shift(ids, -100)
    logits = model(input_ids=ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    assert torch.allclose(model(input_ids=ids, targets=targets).loss, expected, atol=1e-5)


def test_step_sums() -> None:
    sums = step_sums(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 2, 2]]), 3)
    assert sums.tolist() == [1.0, 0.0, 6.0, 0.0]


class OneOfTwoRanks:
    """An accelerator whose other rank holds the given total."""

    num_processes = 2

    def __init__(self, other: float) -> None:
        self.other = other

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return tensor + self.other


def trainer(weights: list[float], other_rank: float) -> MoteTrainer:
    """A trainer with nothing but what the loss reads."""
    made = MoteTrainer.__new__(MoteTrainer)
    made.accelerator = OneOfTwoRanks(other_rank)
    made.state = SimpleNamespace(global_step=3)
    made.chain_config, made.loss_weights = mote_config(), weights
    made._sums, made.args = {}, SimpleNamespace(device="cpu")
    model = mote(question_routing="mean").train()
    made.model, made._mote = model, model.base_model
    return made


def loss_of(made: MoteTrainer, inputs: dict, total: torch.Tensor | None = None) -> torch.Tensor:
    """What ``compute_loss`` does around the host's own part."""
    made._batch = made._weights(inputs)
    labels = inputs["labels"]
    outputs = made.model(**{k: v for k, v in inputs.items() if k != "labels"}, targets=made._batch[1])
    return made._weighted_loss(outputs, labels, num_items_in_batch=total)


def batch(*rows: list[int]) -> dict[str, torch.Tensor]:
    """Rows as the collator pads them."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_evaluation_counts_on_its_own_rank() -> None:
    made = trainer([1.0, 1.0, 1.0, 1.0], other_rank=10.0)
    window, device = [batch(chain(seed=1))], torch.device("cpu")
    everywhere = made._get_num_items_in_batch(window, device)
    made._evaluating = True
    assert made._get_num_items_in_batch(window, device) == everywhere - 10


def test_loss_is_the_weighted_mean_over_the_whole_window_and_all_ranks() -> None:
    weights = [1.0, 0.5, 2.0, 1.0]
    window = [batch(chain(seed=1), chain(analysis=0, seed=2)), batch(chain(guidance=9, seed=3))]
    made = trainer(weights, other_rank=10.0)
    made.model.eval()  # as an evaluation leaves it; the trainer counts the next window before it trains on
    total = made._get_num_items_in_batch(window, torch.device("cpu"))
    made.model.train()
    losses = [loss_of(made, micro, total) for micro in window]

    expected, weight_sum = 0.0, 0.0
    for micro in window:
        logits = made.model(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits
        nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), micro["labels"][:, 1:].flatten(), reduction="none")
        step = torch.zeros_like(micro["input_ids"])
        for row in range(len(step)):
            current = 0
            for t, token in enumerate(micro["input_ids"][row].tolist()):
                current = MARKER_IDS.index(token) // 2 + 1 if token in MARKER_IDS[0::2] else current
                step[row, t] = current
                current = 0 if token in MARKER_IDS[1::2] else current
        w = torch.tensor(weights)[step[:, 1:]] * (micro["labels"][:, 1:] != -100)
        expected += float((nll.view_as(w) * w).sum())
        weight_sum += float(w.sum())
    assert float(total) == pytest.approx(weight_sum + 10.0)
    # Ranks are averaged afterwards, so each holds its sum times their number.
    assert float(sum(losses)) == pytest.approx(2 * expected / (weight_sum + 10.0), rel=1e-5)


def test_a_window_without_weight_gives_zero_with_a_gradient() -> None:
    made = trainer([1.0, 1.0, 1.0, 1.0], other_rank=0.0)
    micro = batch(chain())
    micro["labels"][:] = -100
    total = made._get_num_items_in_batch([micro], torch.device("cpu"))
    loss = loss_of(made, micro, total)
    assert float(loss) == 0.0
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.model.parameters() if p.requires_grad)


def test_metrics_are_means_by_step() -> None:
    made = trainer([1.0, 1.0, 0.0, 1.0], other_rank=0.0)
    made.model.eval()
    loss_of(made, batch(chain(seed=1), chain(seed=2)))
    loss_of(made, batch(chain(analysis=0, seed=3)))
    metrics = made._metrics("eval")
    assert [metrics[f"tokens/{step}"] for step in ("analysis", "guidance", "response")] == [12, 15, 24]
    assert set(metrics) == {"weighted", *(f"{k}/{s}" for k in ("loss", "tokens") for s in mote_config().steps)}
    assert made._metrics("eval") == {}
