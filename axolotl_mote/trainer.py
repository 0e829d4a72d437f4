"""The loss hook: per-step weighted cross-entropy with its own item count, and per-step metrics.

The loss of an optimizer step is sum(weight * nll) / sum(weight) over the whole accumulation window and all ranks. The
host's own scaling differs between axolotl versions and is not relied on. Works for `adapter: mote` and, as a baseline,
for any other adapter on the same chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from torch import Tensor, nn

from axolotl_mote.adapter import mote_model
from axolotl_mote.config import MoteConfig
from axolotl_mote.loss import shift, step_sums, token_losses, token_weights
from axolotl_mote.routing import step_ids_from_tokens
from axolotl_mote.steps import IGNORE_INDEX


class MoteTrainer(AxolotlTrainer):
    """axolotl's trainer with MoTE's loss and metrics.

    ``chain_config`` (marker ids and steps) and ``loss_weights`` (by step id) are set on a subclass by the plugin.
    """

    chain_config: MoteConfig
    loss_weights: Sequence[float]
    _evaluating = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With a loss function of its own the host leaves the loss alone, on every version of axolotl.
        self.compute_loss_func = self._weighted_loss
        self._mote = mote_model(self.model)
        self._sums: dict[str, Tensor] = {}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Total weight of the accumulation window over all ranks, a scalar tensor.

        Evaluation counts on this rank alone: ranks may hold different numbers of batches and would wait for each
        other. The model's mode does not tell the two apart: the first window after an evaluation is counted before the
        model is back in training mode.
        """
        total = torch.zeros((), device=device)
        for batch in batch_samples:
            total += self._weights(batch)[0].sum().to(device)
        return total if self._evaluating else self.accelerator.reduce(total, reduction="sum")

    def _weights(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, targets and their steps for a batch, each of shape (B, T)."""
        step_ids = step_ids_from_tokens(inputs["input_ids"], self.chain_config, inputs.get("position_ids"))
        targets, steps = shift(inputs["labels"], IGNORE_INDEX), shift(step_ids, 0)
        return token_weights(targets, steps, self.loss_weights), targets, steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Run one micro-batch; axolotl does what else it does, and the loss comes from ``_weighted_loss``."""
        self._batch = self._weights(inputs)
        if self._mote is not None:
            self._mote.routing.step = self.state.global_step
            inputs = {**inputs, "targets": self._batch[1]}
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

    def _weighted_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Weighted loss of the current micro-batch, scaled so that the mean over ranks is the optimizer step's loss.

        Args:
            outputs: The model's; per-token losses from a MoTE model, logits from any other.
            labels: Unused, the targets are already shifted.
            num_items_in_batch: Total weight over the window and all ranks; evaluation counts its batch alone.
        """
        weights, targets, steps = self._batch
        if self._mote is not None:
            losses = outputs.loss
        else:
            losses = token_losses(outputs.logits, targets, nn.Identity(), outputs.logits.shape[-1])
        training = self.model.training
        self._count("train" if training else "eval", losses.detach(), weights, targets, steps)
        if num_items_in_batch is None or not training:
            total, ranks = weights.sum(), 1
        else:
            total, ranks = num_items_in_batch.to(losses.device), self.accelerator.num_processes
        # A window without any weight gives a zero that still has a gradient, so that no rank leaves the others waiting.
        return (losses * weights).sum() * ranks / total.clamp(min=torch.finfo(torch.float32).tiny)

    # --- metrics ----------------------------------------------------------------------------------------------------

    def _count(self, split: str, losses: Tensor, weights: Tensor, targets: Tensor, steps: Tensor) -> None:
        """Add a batch to the sums by step; stays on the device."""
        counted = (targets != IGNORE_INDEX).to(torch.float32)
        size = self.chain_config.num_steps
        rows = (losses * counted, counted, losses * weights, weights)
        sums = torch.stack([step_sums(row, steps, size) for row in rows])
        self._sums[split] = self._sums[split] + sums if split in self._sums else sums

    def _metrics(self, split: str) -> dict[str, float]:
        """Mean loss and token count by step since the last call, over all ranks."""
        # A rank without a batch must take part in the sum all the same.
        empty = torch.zeros(4, self.chain_config.num_steps + 1, device=self.args.device)
        sums = self._sums.pop(split, empty)
        losses, counts, weighted, weights = self.accelerator.reduce(sums, reduction="sum").tolist()
        if not sum(counts):
            return {}
        metrics = {"weighted": sum(weighted) / sum(weights)} if sum(weights) else {}
        for number, step in enumerate(self.chain_config.steps, start=1):
            if counts[number]:
                metrics[f"loss/{step}"] = losses[number] / counts[number]
            metrics[f"tokens/{step}"] = counts[number]
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `loss/<step>` and `tokens/<step>` to the training logs."""
        if "loss" in logs:
            metrics = self._metrics("train")
            metrics.pop("weighted", None)
            logs.update(metrics)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate; `eval_loss` becomes the mean over tokens, however they were batched, and each step gets its own."""
        self._sums.pop("eval", None)
        self._evaluating = True
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self._evaluating = False
        metrics = self._metrics("eval")
        if "weighted" in metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = metrics.pop("weighted")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output
