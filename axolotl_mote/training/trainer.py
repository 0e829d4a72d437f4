"""The trainer: the loss of `model.loss` with its own item count, and metrics by step.

Works for `adapter: mote` and, as a baseline, for any other adapter on the same chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from torch import Tensor, nn

from axolotl_mote.chain.steps import IGNORE_INDEX
from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.model.adapter import mote_model
from axolotl_mote.model.loss import Targets, build_targets, scored_positions, step_sums, token_losses, weighted_loss
from axolotl_mote.model.routing import step_ids_from_tokens
from axolotl_mote.training.checkpoints import STATE
from axolotl_mote.training.compat import NamedFullDisk, OwnLoss, WholeAdapters, local_values, reshard
from axolotl_mote.training.output import share_weights

Batch = dict[str, Any]


class ScoredCollator:
    """A collator whose batches also hold ``scored``, the tokens that the head runs on, shape (N,)."""

    def __init__(self, collate: Callable[[Any], Batch]) -> None:
        self.collate = collate
        self.tokenizer = getattr(collate, "tokenizer", None)  # the trainer saves it

    def __call__(self, features: Any) -> Batch:
        """Collate, then find the tokens while the labels are still on the CPU."""
        batch = self.collate(features)
        batch["scored"] = scored_positions(batch["labels"])
        return batch


class MoteTrainer(OwnLoss, WholeAdapters, NamedFullDisk, AxolotlTrainer):
    """axolotl's trainer with MoTE's loss and metrics.

    The plugin sets the attributes below on a subclass: axolotl creates the trainer, so no argument can carry them.

    Attributes:
        vocabulary: Steps and marker ids.
        loss_weights: Loss weight by step id, S + 1 of them.
        write_card: Writes the adapter's model card.
    """

    vocabulary: StepVocabulary
    loss_weights: Sequence[float]
    write_card: Callable[[], None]
    data_collator: Any
    eval_data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_fsdp()
        self._mote = mote_model(self.model)
        if self._mote is not None:
            self.data_collator = ScoredCollator(self.data_collator)
            self.train_data_collator = self.data_collator
            if self.eval_data_collator is not None:
                self.eval_data_collator = ScoredCollator(self.eval_data_collator)
        self._sums: dict[str, Tensor] = {}

    # --- loss -------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Collect the batches of one optimizer step.

        Returns:
            The batches with their ``step_ids`` and ``targets``, and the total weight of their tokens over all ranks, a
            scalar tensor.
        """
        collected, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._with_targets(batch) for batch in collected]
        total = torch.zeros((), device=device)
        for batch in batches:
            total += batch["targets"].weights.sum().to(device)
        return batches, self.accelerator.reduce(total, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Weighted loss of one micro-batch, scaled so that the mean over ranks is the optimizer step's loss.

        Args:
            model: The model, as wrapped for training.
            inputs: The micro-batch; in evaluation it gets its ``step_ids`` and ``targets`` here.
            return_outputs: Return the model's output too.
            num_items_in_batch: Total weight over the window and all ranks; None in evaluation, where a micro-batch
                counts alone.
        """
        inputs = self._with_targets(inputs)
        targets: Targets = inputs.pop("targets").to(inputs["input_ids"].device)
        if self._mote is None:
            del inputs["step_ids"]
            outputs = self.run_model(model, inputs)
            losses = token_losses(outputs.logits, targets.ids, nn.Identity(), outputs.logits.shape[-1])
        else:
            self._mote.routing.step = self.state.global_step
            outputs = self.run_model(model, {**inputs, "targets": targets.ids})
            losses = outputs.loss
        evaluates = num_items_in_batch is None
        self._count("eval" if evaluates else "train", losses.detach(), targets)
        ranks = 1 if evaluates else self.accelerator.num_processes
        loss = weighted_loss(losses, targets.weights, num_items_in_batch, ranks)
        return (loss, outputs) if return_outputs else loss

    def _with_targets(self, batch: Batch) -> Batch:
        """A copy of a batch with its ``step_ids`` and ``targets``, which are computed once per micro-batch."""
        if "targets" in batch:
            return dict(batch)
        step_ids = step_ids_from_tokens(batch["input_ids"], self.vocabulary, batch.get("position_ids"))
        # Targets is neither a tuple nor a dict: in those transformers would cast the weights to DeepSpeed's dtype.
        return {**batch, "step_ids": step_ids, "targets": build_targets(batch["labels"], step_ids, self.loss_weights)}

    # --- metrics ----------------------------------------------------------------------------------------------------

    def _count(self, split: str, losses: Tensor, targets: Targets) -> None:
        """Add a batch to the sums by step; stays on the device."""
        counted = (targets.ids != IGNORE_INDEX).to(torch.float32)
        rows = (losses * counted, counted, losses * targets.weights, targets.weights)
        sums = torch.stack([step_sums(row, targets.steps, self.vocabulary.num_steps) for row in rows])
        self._sums[split] = self._sums[split] + sums if split in self._sums else sums

    def _metrics(self, split: str) -> dict[str, float]:
        """Mean loss and token count by step since the last call, over all ranks."""
        # A rank without a batch must take part in the sum too.
        empty = torch.zeros(4, self.vocabulary.num_steps + 1, device=self.args.device)
        sums = self._sums.pop(split, empty)
        losses, counts, weighted, weights = self.accelerator.reduce(sums, reduction="sum").tolist()
        if not sum(counts):
            return {}
        metrics = {"weighted": sum(weighted) / sum(weights)} if sum(weights) else {}
        for number, step in enumerate(self.vocabulary.steps, start=1):
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
            if not all(map(math.isfinite, metrics.values())):
                self._check_weights()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate; `eval_loss` becomes the mean over tokens, however they were batched, and each step gets its own."""
        self._sums.pop("eval", None)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._metrics("eval")
        if "weighted" in metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = metrics.pop("weighted")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    # --- weights that are no numbers --------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train.

        Raises:
            FloatingPointError: If a trained weight is no longer a finite number; such weights are never saved.
        """
        output = super().train(*args, **kwargs)
        self._check_weights()  # axolotl saves the adapter next
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, once its weights are known to be numbers: a checkpoint may replace the last good one.

        A checkpoint that an earlier run left in its place stops being whole here, before its files are replaced.
        """
        self._check_weights()
        if _internal_call and output_dir and self.args.should_save:
            Path(output_dir, STATE).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            share_weights(Path(output_dir or self.args.output_dir))

    def _check_weights(self) -> None:
        """Check the trained weights on all ranks. A loss alone may be infinite under fp16, whose scaler skips it."""
        reshard(self.model)
        trained = [local_values(parameter) for parameter in self.model.parameters() if parameter.requires_grad]
        # Offloaded parts are on the CPU, where NCCL sums nothing.
        broken = torch.stack([(~torch.isfinite(values).all()).to(self.args.device) for values in trained]).sum()
        if count := int(self.accelerator.reduce(broken, reduction="sum")):
            raise FloatingPointError(
                f"learning_rate must keep the weights finite; got nan or inf in {count} tensors after step "
                f"{self.state.global_step}. Nothing of this step was saved. Lower it, and go on from the last "
                "checkpoint with resume_from_checkpoint."
            )

    # --- hub --------------------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the adapter's card over transformers' own, before the folder is pushed to a hub."""
        super().create_model_card(*args, **kwargs)
        self.write_card()
