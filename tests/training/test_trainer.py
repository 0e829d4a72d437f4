"""The trainer's loss, item count and metrics: a real trainer on a tiny model, against sums written out by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from kit import STEPS, base_model, chain, mote, mote_config
from peft import LoraConfig, get_peft_model
from torch import Tensor

from axolotl_mote.training import trainer as trainer_module
from axolotl_mote.training.trainer import MoteTrainer, ScoredCollator

CPU = torch.device("cpu")

pytestmark = pytest.mark.smoke  # against every version that is supported


class OneOfTwoRanks:
    """An accelerator whose other rank holds the given total."""

    num_processes = 2
    parallelism_config = None

    def __init__(self, other: float) -> None:
        self.other = other

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return tensor + self.other

    def unwrap_model(self, model: Any) -> Any:
        return model


def plain_lora() -> Any:
    """A plain LoRA on a table that holds the markers; their logits differ by token."""
    model = base_model("llama")
    model.resize_token_embeddings(102, mean_resizing=False)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def build_trainer(folder: Path, model: Any, weights: list[float], dataset: Any = None) -> MoteTrainer:
    """As axolotl builds it, with the attributes that the plugin sets."""
    from axolotl.core.training_args import AxolotlTrainingArguments

    arguments = AxolotlTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", per_device_eval_batch_size=1, include_tkps=False
    )
    kind = type("Trainer", (MoteTrainer,), {"vocabulary": mote_config().vocabulary, "loss_weights": weights})
    return kind(model=model, args=arguments, eval_dataset=dataset, data_collator=collate, eval_data_collator=collate)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return batch(*(row["input_ids"] for row in rows))


def batch(*rows: list[int]) -> dict[str, Tensor]:
    """Rows as the collator pads them; the first five tokens are the question."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(*rows: list[int]) -> dict[str, Tensor]:
    """Rows packed into one, as one batch."""
    alone = batch(*rows)["labels"]
    labels = [token for row, label in zip(rows, alone.tolist(), strict=True) for token in label[: len(row)]]
    positions = [position for row in rows for position in range(len(row))]
    ids = [token for row in rows for token in row]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }


def sums(model: Any, micro: dict[str, Tensor], weights: list[float]) -> tuple[float, float]:
    """sum(weight * nll) and sum(weight) of a micro-batch, each document by itself."""
    vocabulary = mote_config().vocabulary
    logits = model(**{name: micro[name] for name in micro if name not in ("labels", "step_ids")}).logits
    total = weight_sum = 0.0
    for row in range(len(micro["input_ids"])):
        tokens, labels = micro["input_ids"][row].tolist(), micro["labels"][row].tolist()
        positions = micro["position_ids"][row].tolist() if "position_ids" in micro else list(range(len(tokens)))
        starts = [i for i in range(len(tokens)) if i == 0 or positions[i] != positions[i - 1] + 1]
        steps: list[int] = []
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            steps += vocabulary.step_ids(tokens[start:end])
        nll = F.cross_entropy(logits[row, :-1].float(), micro["labels"][row, 1:], reduction="none").tolist()
        for t in range(1, len(tokens)):
            if labels[t] != -100:
                total += weights[steps[t]] * nll[t - 1]
                weight_sum += weights[steps[t]]
    return total, weight_sum


WEIGHTS = [1.0, 0.5, 2.0, 1.0]
WINDOW = [
    batch(chain(seed=1), chain(analysis=0, seed=2)),
    batch(chain(guidance=9, seed=3)),
    packed(chain(seed=4)[:-4], chain(analysis=0, seed=5)),  # the first document ends inside a step
]


@pytest.mark.parametrize("kind", ["mote", "lora"])
def test_loss_is_the_weighted_mean_over_the_whole_window_and_all_ranks(kind: str, tmp_path: Path) -> None:
    model = mote(question_routing="mean") if kind == "mote" else plain_lora()
    made = build_trainer(tmp_path, model, WEIGHTS)
    made.accelerator = OneOfTwoRanks(10.0)
    model.eval()  # as an evaluation leaves it; the trainer counts the next window before it trains on
    batches, total = made.get_batch_samples(iter([dict(micro) for micro in WINDOW]), len(WINDOW), CPU)
    model.train()
    losses = [made.compute_loss(model, micro, num_items_in_batch=total) for micro in batches]
    expected = [sums(model, micro, WEIGHTS) for micro in WINDOW]
    weight_sum = sum(weight for _, weight in expected) + 10.0
    assert float(total) == pytest.approx(weight_sum)
    # Ranks are averaged afterwards, so each holds its sum times their number.
    assert float(sum(losses).detach()) == pytest.approx(2 * sum(value for value, _ in expected) / weight_sum, rel=1e-5)


def test_the_head_runs_on_scored_tokens_alone(tmp_path: Path) -> None:
    model = mote(question_routing="mean").eval()
    made = build_trainer(tmp_path, model, WEIGHTS)

    def masked(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        collated = collate(rows)
        collated["labels"][:, :150] = -100
        return collated

    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    features = [{"input_ids": [7] * 150 + chain()}]
    losses = [made.compute_loss(model, collator(features)) for collator in (masked, ScoredCollator(masked))]
    assert rows == [150 + len(chain()), 64]
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-6)
    for collator in (made.data_collator, made.eval_data_collator):
        assert collator(features)["scored"].shape == (192,)  # 170 tokens have a label
    assert not isinstance(build_trainer(tmp_path, plain_lora(), WEIGHTS).data_collator, ScoredCollator)


def test_step_ids_and_targets_are_computed_once_per_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from axolotl_mote.model import routed

    calls = []

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(routed, "step_ids_from_tokens", counted(trainer_module.step_ids_from_tokens))
    monkeypatch.setattr(trainer_module, "step_ids_from_tokens", counted(trainer_module.step_ids_from_tokens))
    monkeypatch.setattr(trainer_module, "build_targets", counted(trainer_module.build_targets))
    model = mote()
    made = build_trainer(tmp_path, model, WEIGHTS)
    batches, total = made.get_batch_samples(iter([dict(micro) for micro in WINDOW]), len(WINDOW), CPU)
    for micro in batches:
        made.compute_loss(model.train(), micro, num_items_in_batch=total)
    assert calls == ["step_ids_from_tokens", "build_targets"] * len(WINDOW)
    made.compute_loss(model.eval(), dict(WINDOW[0]))
    assert calls == ["step_ids_from_tokens", "build_targets"] * (len(WINDOW) + 1)


def test_deepspeed_leaves_the_weights_in_float32(tmp_path: Path) -> None:
    """transformers casts the floating-point tensors of a batch to DeepSpeed's dtype."""
    made = build_trainer(tmp_path, mote(), WEIGHTS)
    batches, _ = made.get_batch_samples(iter([dict(WINDOW[0])]), 1, CPU)
    made.is_deepspeed_enabled = True
    dtype = SimpleNamespace(dtype=lambda: torch.bfloat16)
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=dtype))
    made.accelerator = SimpleNamespace(state=state)
    moved = made._prepare_inputs({**batches[0], "other": torch.zeros(1)})
    assert moved["other"].dtype == torch.bfloat16
    assert moved["targets"].weights.dtype == torch.float32


def test_a_window_without_weight_gives_zero_with_a_gradient(tmp_path: Path) -> None:
    model = mote(question_routing="mean")
    made = build_trainer(tmp_path, model, [1.0] * 4)
    micro = batch(chain())
    micro["labels"][:] = -100
    batches, total = made.get_batch_samples(iter([micro]), 1, CPU)
    loss = made.compute_loss(model.train(), batches[0], num_items_in_batch=total)
    assert float(loss) == 0.0
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


DIVERGED = r"^learning_rate must keep the weights finite; got nan or inf in 1 tensors after step 0\. Nothing .* saved"


@pytest.mark.parametrize("kind", ["mote", "lora"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_not_saved(kind: str, value: float, tmp_path: Path) -> None:
    model = mote() if kind == "mote" else plain_lora()
    made = build_trainer(tmp_path / "out", model, WEIGHTS)
    made.save_model(tmp_path / "whole")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[1, 1] = value
    with pytest.raises(FloatingPointError, match=DIVERGED):
        made.save_model(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    made._sums["train"] = torch.full((4, 4), value)
    with pytest.raises(FloatingPointError, match=DIVERGED):
        made.log({"loss": 0.0})


def test_an_infinite_loss_alone_goes_on_and_another_rank_counts(tmp_path: Path) -> None:
    """Under fp16 the scaler skips a step whose gradients overflow."""
    made = build_trainer(tmp_path, mote(), WEIGHTS)
    made._sums["train"] = torch.full((4, 4), float("inf"))
    made.log({"loss": float("inf")})
    made.accelerator = OneOfTwoRanks(1.0)  # type: ignore[assignment]
    with pytest.raises(FloatingPointError, match=DIVERGED):
        made.save_model(tmp_path / "broken")


def test_the_part_of_a_partitioned_weight_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ZeRO-3: the parameter itself is empty."""
    model = mote()
    made = build_trainer(tmp_path, model, WEIGHTS)
    parameter = next(p for name, p in model.named_parameters() if "lora_B" in name)
    parameter.data = torch.empty(0)
    parameter.ds_numel, parameter.ds_process_group = 5, None  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 1)
    parameter.ds_tensor = torch.tensor([1.0, 2.0, float("nan")])  # type: ignore[attr-defined]
    made._check_weights()  # of five values the second of two ranks has two: behind them is whatever memory held
    parameter.ds_numel = 6  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match=DIVERGED):
        made.save_model(tmp_path / "broken")


def test_evaluation_counts_on_its_own_rank_and_reports_means_by_step(tmp_path: Path) -> None:
    """Ranks may evaluate different numbers of batches: a reduction per batch would leave some waiting."""
    weights = [1.0, 1.0, 0.0, 1.0]
    rows = [chain(seed=1), chain(seed=2), chain(analysis=0, seed=3)]
    model = mote(question_routing="mean")
    made = build_trainer(tmp_path, model, weights, Dataset.from_dict({"input_ids": rows}))
    reductions = count_reductions(made)
    metrics = made.evaluate()
    assert len(reductions) == 1
    expected = [sums(model, batch(row), weights) for row in rows]
    assert metrics["eval_loss"] == pytest.approx(sum(v for v, _ in expected) / sum(w for _, w in expected), rel=1e-5)
    assert [metrics[f"eval_tokens/{step}"] for step in STEPS] == [12, 15, 24]
    for number, step in enumerate(STEPS, start=1):
        alone = [sums(model, batch(row), [float(number == k) for k in range(4)]) for row in rows]
        mean = sum(v for v, _ in alone) / sum(w for _, w in alone)
        assert metrics[f"eval_loss/{step}"] == pytest.approx(mean, rel=1e-5)
    made.log({"loss": 1.0})
    assert not {"loss/response", "tokens/response"} & set(made.state.log_history[-1])  # nothing is left for training


def count_reductions(made: MoteTrainer) -> list[int]:
    """A list that grows by one whenever the trainer reduces a tensor over the ranks."""
    calls: list[int] = []
    reduce = made.accelerator.reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return reduce(*args, **kwargs)

    made.accelerator.reduce = counted  # type: ignore[method-assign]
    return calls
