"""Lines about adapters that were trained a few steps: whether all of it moves, is saved, loads and resumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from axolotl_mote.doctor.comparing import Comparison, compare, judge
from axolotl_mote.doctor.lines import FAILED, NOT_TESTED, OK, Finding, NotTestedError
from axolotl_mote.doctor.probes import (
    SHARED,
    evaluating,
    idle_experts,
    on_device,
    probe_chain,
    random_experts,
    wrong_route,
)
from axolotl_mote.doctor.session import Session, TrainedRun, adapter_tensors
from axolotl_mote.generation.loading import load_mote
from axolotl_mote.model.compat import attention_implementation
from axolotl_mote.training.selfcheck import precision

WEIGHTS = "adapter_model.safetensors"
EXACT = 1e-3
"""Largest difference of two trained adapters in float32, as a share of what training changed: sums in another order."""
MARKERS = "a marker"
_NAMED = 3


# --- saving ---------------------------------------------------------------------------------------------------------


def check_saving(session: Session) -> Finding:
    """Save as axolotl does, read the file, load it with ``load_mote``, and compare a chain's logits."""
    from axolotl.train import save_trained_model

    cfg, tuner, vocabulary = session.cfg, session.tuner, session.codec.vocabulary
    tokens = on_device(session, probe_chain(session).tokens())
    steps = torch.tensor([vocabulary.step_ids(tokens[0].tolist())], device=tokens.device)
    folder, exact, device, dtype = Path(cfg.output_dir), session.exact, tuner.model.device, tuner.model.dtype
    with random_experts(tuner):
        with evaluating(tuner), session.precision():
            expected = tuner(input_ids=tokens, use_cache=False).logits
            wrong = tuner(input_ids=tokens, use_cache=False, step_ids=wrong_route(steps, vocabulary.num_steps)).logits
        save_trained_model(cfg, session.trainer, session.trainer.model)
        session.codec.tokenizer.save_pretrained(folder)
        if faults := faults_of_file(folder, adapter_tensors(session.trainer.model)):
            return Finding(FAILED, "; ".join(faults[:_NAMED]), "output_dir")
    size = (folder / WEIGHTS).stat().st_size / 1e6
    options: dict[str, Any] = {"attn_implementation": attention_implementation(tuner.model.config)}
    if quantization := getattr(tuner.model.config, "quantization_config", None):
        options["quantization_config"] = quantization
    del tuner
    session.forget("model")  # two models need not fit
    loaded, _ = load_mote(folder, cfg.base_model, dtype=dtype, device=device, self_check=False, **options)
    with torch.no_grad(), precision(cfg, loaded):
        found = loaded(input_ids=tokens, use_cache=False).logits
    return judge(
        compare(found, expected, wrong, exact),
        f"{size:.1f} MB; loaded again",
        "the loaded adapter gives other logits than the one that was saved",
        "experts of other steps",
        "output_dir",
    )


def faults_of_file(folder: Path, expected: Mapping[str, Tensor]) -> list[str]:
    """What a saved adapter lacks: tensors that are missing, unknown, of another shape or of other values.

    Args:
        folder: The adapter's folder.
        expected: Its tensors in memory, by their names in the file.
    """
    if not (folder / WEIGHTS).is_file():
        return [f"{WEIGHTS} was not written"]
    saved = load_file(folder / WEIGHTS)
    faults = [f"{name} is missing" for name in sorted(expected.keys() - saved.keys())]
    faults += [f"{name} does not belong to the adapter" for name in sorted(saved.keys() - expected.keys())]
    for name in sorted(expected.keys() & saved.keys()):
        ours, theirs = expected[name], saved[name]
        if ours.shape != theirs.shape:
            faults.append(f"{name} has the shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
        elif not torch.equal(ours.to(theirs.dtype), theirs):
            faults.append(f"{name} has other values than in memory")
    return faults


# --- training -------------------------------------------------------------------------------------------------------


def trained_as_configured(session: Session) -> TrainedRun:
    """A few steps with the user's optimizer, learning rate and compilation."""
    _ = session.data
    return session.once("training run", lambda: session.train("training", {}, measured=True))


def check_training_moves(session: Session) -> Finding:
    """Losses are numbers, and every expert of every layer and every marker row has moved."""
    run, steps = trained_as_configured(session), session.codec.steps
    said = f"{len(run.losses)} steps, losses {', '.join(f'{loss:.3f}' for loss in run.losses)}"
    if not run.losses or not all(map(math.isfinite, run.losses)):
        return Finding(FAILED, f"the loss is not a number: {said}", "learning_rate")
    if faults := faults_of_file(run.folder, run.after):
        return Finding(FAILED, "; ".join(faults[:_NAMED]), "output_dir")
    rare = [
        step for step, marker in zip(steps, session.codec.vocabulary.start_ids, strict=True) if marker not in run.seen
    ]
    idle = idle_experts(session.options.expert_weight, steps)
    still = {name: places for name, places in unmoved(run.before, run.after, steps).items() if name not in idle}
    if rare and still.keys() <= {*rare, MARKERS}:
        return Finding(NOT_TESTED, f"no chain of {said} has {', '.join(rare)}: raise --steps")
    if still:
        return Finding(FAILED, f"{_summary(still)}: {said}", "learning_rate")
    others = f", {', '.join(sorted(idle))} left out" if idle else ""
    return Finding(OK, f"{len(steps) + 1 - len(idle)} experts moved in every layer, and all markers{others}: {said}")


def unmoved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], steps: tuple[str, ...]) -> dict[str, list[str]]:
    """The experts that did not move, by name, with their layers; marker rows under ``MARKERS``.

    Args:
        before: Tensors by their names in the file.
        after: The same after training.
        steps: Names of the steps.
    """
    found: dict[str, list[str]] = {}
    names = [*steps, SHARED]
    for name, old in before.items():
        new = after[name]
        if ".lora_marker_rows" in name:
            if not (old != new).any(-1).all():
                found.setdefault(MARKERS, []).append(name)
            continue
        moved = (old != new).any(1 if ".lora_A" in name else 0)
        for expert, block in zip(names, moved.chunk(len(names)), strict=True):
            if not block.any():
                found.setdefault(expert, []).append(name)
    return found


def _summary(still: Mapping[str, list[str]]) -> str:
    return "; ".join(
        f"{name} did not move in {len(layers)} tensors ({', '.join(layers[:_NAMED])})" for name, layers in still.items()
    )


# --- resuming -------------------------------------------------------------------------------------------------------


def comparable_steps(session: Session) -> tuple[int, int]:
    """Steps and accumulated micro-batches of runs that are compared, within one epoch.

    At the end of an epoch several processes fill up their last batch, and one does not.

    Raises:
        NotTestedError: If the data has too few rows for two steps.
    """
    rows, accumulation = len(session.data.train_dataset), session.accumulation
    per_batch = int(session.cfg.micro_batch_size) * session.processes
    while accumulation > 1 and rows // (per_batch * accumulation) < 2:
        accumulation -= 1
    steps = min(session.steps, rows // (per_batch * accumulation))
    if steps < 2:
        raise NotTestedError(
            f"two steps of {session.processes} processes need {2 * per_batch} chains; there are {rows}"
        )
    return steps, accumulation


def reference_run(session: Session) -> TrainedRun:
    """What all others are compared with: one process takes the batches of all, and saves a checkpoint halfway."""

    def run() -> TrainedRun:
        steps, accumulation = comparable_steps(session)
        return session.train("reference", session.comparable() | _schedule(steps, accumulation * session.processes))

    return session.once("reference run", run)


def _schedule(steps: int, accumulation: int) -> dict[str, Any]:
    halfway = {"save_strategy": "steps", "save_steps": steps // 2}
    return {"max_steps": steps, "gradient_accumulation_steps": accumulation, **halfway}


def check_resume(session: Session) -> Finding:
    """Continue from the checkpoint halfway, and compare the adapter at the end."""
    steps, accumulation = comparable_steps(session)
    reference = reference_run(session)
    checkpoint = reference.folder / f"checkpoint-{steps // 2}"
    changes = session.comparable() | _schedule(steps, accumulation * session.processes)
    resumed = session.train("resumed", changes, resume=checkpoint)
    halfway = load_file(checkpoint / WEIGHTS)
    comparison = compare_adapters(resumed.after, reference.after, halfway, session.exact_run)
    return judge_adapters(
        comparison,
        f"steps {steps // 2 + 1} to {steps} again",
        f"steps {steps // 2 + 1} to {steps} end elsewhere after resuming",
        "save_strategy",
    )


def compare_adapters(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor], exact: bool
) -> Comparison:
    """Differences of two adapters, each tensor's as a share of its change since they were equal; the worst counts."""
    worst = 0.0
    for name, end in expected.items():
        change = float((end.double() - start[name].double()).norm())
        gap = float((found[name].double() - end.double()).norm())
        share = gap / change if change else math.inf if gap else 0.0
        worst = max(worst, share if math.isfinite(share) else math.inf)
    return Comparison(worst, 1.0, exact)


def judge_adapters(comparison: Comparison, good: str, bad: str, key: str) -> Finding:
    """The finding of two adapters: in float32 they must agree to EXACT of the change, else to a tenth."""
    limit = EXACT if comparison.exact else comparison.limit
    said = f"difference {comparison.difference:.1e} of the change in the worst tensor, {limit:.1e} allowed"
    figures = {"difference": comparison.difference, "limit": limit}
    if comparison.difference > limit:
        return Finding(FAILED, f"{bad}: {said}", key, figures)
    return Finding(OK, f"{good}: {said}", figures=figures)


CHECKS: dict[str, Callable[[Session], Finding]] = {
    "saving": check_saving,
    "training": check_training_moves,
    "resume": check_resume,
}
