"""The adapter checks itself: one short chain goes through a model of any family, and equalities must hold on it.

Families differ in what they do with a mask, with positions, with a cache and with logits. A fault there changes numbers
and raises nothing, so it is looked for before it costs anything. A few forwards of about 30 tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.model.adapter import MoteModel, adapter_disabled, mote_model
from axolotl_mote.model.loss import shift
from axolotl_mote.model.routing import step_ids_from_tokens

# Mean difference of logits that is allowed, in units of their standard deviation: rounding stays well below.
_TOLERANCE = 1e-4  # in float32
_SAME_SHAPES = 0.01  # in half precision and TF32, where both ways run the same kernels on almost the same shapes
_OTHER_SHAPES = 0.2  # where they do not
_QUESTION, _STEP = 5, 3  # tokens of the question, and of each step between its markers


class SelfCheckError(ValueError):
    """A base model for which the adapter would be silently wrong."""


Forward = Callable[..., Any]


def check_training(model: Any, forward: Forward | None = None) -> None:
    """Check what training relies on: causality, the loss, and, if steps are dropped, that the mask is exact.

    Args:
        model: A model with a MoTE adapter, however it is wrapped. Its weights, modes and random state stay as they are.
        forward: Runs the model, and takes what ``MoteModel.forward`` takes; by default that. Under FSDP2 the wrapped
            model, which gathers the parameters.

    Raises:
        SelfCheckError: If an equality does not hold; names the family and what to switch off.
    """
    tuner = _tuner(model)
    run: Forward = tuner if forward is None else forward  # a compiled model has a length, and none to give
    with _quiet(tuner):
        way_out = "Use a model whose tokens see no later ones."
        _compare(tuner, "causality", way_out, lambda: _causality(tuner, run), _SAME_SHAPES)
        _compare(tuner, "loss", "Report this family.", lambda: _loss(tuner, run), _SAME_SHAPES)
        if any(tuner.routing.step_dropout):
            _compare(tuner, "step dropout", "Set mote.step_dropout: 0.", lambda: _step_dropout(tuner, run))


def check_generation(model: Any) -> None:
    """Check that a forward which continues a KV cache gives the logits of one over the whole chain.

    Where the base model alone is off as well, that is its own way with a cache, and only a warning.

    Args:
        model: As for ``check_training``.

    Raises:
        SelfCheckError: If it does not, though it does for the base model alone.
    """
    tuner = _tuner(model)
    with _quiet(tuner):
        try:
            _compare(tuner, "generation with a cache", "Generate with use_cache=False.", lambda: _cached(tuner))
        except SelfCheckError as error:
            with adapter_disabled(model):
                alone = _outcome(lambda: _cached(tuner, markers=False))
            if alone is None or alone > _tolerance(tuner, _OTHER_SHAPES):
                warnings.warn(f"{error} The base model alone is off as well.", stacklevel=2)
            else:
                raise


# --- the equalities -------------------------------------------------------------------------------------------------


def _causality(tuner: MoteModel, run: Forward) -> tuple[Tensor, Tensor]:
    """Logits before the last token, and the same with another last token: two rows of a batch."""
    tokens = _chain(tuner)
    other = tokens.clone()
    other[:, -1] = tokens[:, 0]
    one, two = run(input_ids=torch.cat([tokens, other])).logits[:, :-1]
    return one, two


def _loss(tuner: MoteModel, run: Forward) -> tuple[Tensor, Tensor]:
    """Losses as training computes them, and those of the model's own logits."""
    tokens = _chain(tuner)
    targets = shift(tokens, -100)
    logits = run(input_ids=tokens).logits[0].float()
    own = F.cross_entropy(logits, targets[0], reduction="none", ignore_index=-100)
    return run(input_ids=tokens, targets=targets).loss[0, :-1], own[:-1]


def _step_dropout(tuner: MoteModel, run: Forward) -> tuple[Tensor, Tensor]:
    """Logits of the tokens that are left when every step that can be dropped is, and of a chain without those steps."""
    tokens, dropout = _chain(tuner), tuner.routing.step_dropout
    dropped = torch.tensor([step for step, p in enumerate(dropout, start=1) if p], device=tokens.device)
    kept = ~torch.isin(step_ids_from_tokens(tokens, tuner.routing.vocabulary), dropped)
    with _dropping(tuner):
        masked = run(input_ids=tokens).logits
    return masked[kept], run(input_ids=tokens[kept].unsqueeze(0)).logits[0]


def _cached(tuner: MoteModel, markers: bool = True) -> tuple[Tensor, Tensor]:
    """Logits of the last tokens of a chain as ``generate`` sees them, and those of one forward."""
    tokens, new = _chain(tuner, markers), _STEP + 2
    length = tokens.shape[1]
    settings = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    base = tuner.model
    own, base.generation_config = base.generation_config, settings  # whatever a base asks for, such as beams
    try:
        found = base.generate(
            input_ids=tokens[:, :-new],
            attention_mask=torch.ones_like(tokens[:, :-new]),
            prefix_allowed_tokens_fn=lambda _, ids: [int(tokens[0, len(ids)])],
        )
    finally:
        base.generation_config = own
    whole = tuner(input_ids=tokens, use_cache=False).logits[0, length - new - 1 : -1]
    return torch.cat(found.logits), whole


# --- how they are compared ------------------------------------------------------------------------------------------


def _compare(
    tuner: MoteModel,
    what: str,
    way_out: str,
    run: Callable[[], tuple[Tensor, Tensor]],
    coarse: float = _OTHER_SHAPES,
) -> None:
    try:
        difference = _difference(*run())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise SelfCheckError(_message(tuner, what, f"{type(error).__name__}: {error}".rstrip("."), way_out)) from error
    allowed = _tolerance(tuner, coarse)
    if not difference <= allowed:  # NaN is no equality either
        off = f"a mean difference of {difference:.1e} standard deviations, {allowed:g} allowed"
        raise SelfCheckError(_message(tuner, what, off, way_out))


def _message(tuner: MoteModel, what: str, found: str, way_out: str) -> str:
    name = type(tuner.model).__name__
    return (
        f"{what} must be exact on the base model; the self-check of {name} got {found}. {way_out} "
        "mote.self_check: false (self_check=False) skips the check."
    )


def _outcome(run: Callable[[], tuple[Tensor, Tensor]]) -> float | None:
    try:
        return _difference(*run())
    except Exception:  # noqa: BLE001  # whatever the base model raises, it is not the adapter's
        return None


def _difference(found: Tensor, expected: Tensor) -> float:
    """Mean difference in standard deviations of what is expected; both may be minus infinity in the same places."""
    found, expected = found.float(), expected.float()
    same = found == expected
    spread = expected[expected.isfinite()].std()
    return 0.0 if same.all() else float(torch.where(same, 0, found - expected).abs().mean() / spread)


def _tolerance(tuner: MoteModel, coarse: float) -> float:
    device = tuner.model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tuner.model.dtype
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return _TOLERANCE if exact else coarse


# --- the state in which they run ------------------------------------------------------------------------------------


def _tuner(model: Any) -> MoteModel:
    tuner = mote_model(model)
    if tuner is None:
        raise ValueError(f"model must have a MoTE adapter; got {type(model).__name__} without one.")
    return tuner


@contextmanager
def _quiet(tuner: MoteModel) -> Iterator[None]:
    """No gradients, no dropout of any kind, and no other thread's forward."""
    routing = tuner.routing
    modes = [(module, module.training) for module in tuner.modules()]
    with routing.lock, torch.no_grad():
        dropout = routing.step_dropout
        tuner.eval()
        try:
            yield
        finally:
            routing.step_dropout = dropout
            for module, mode in modes:
                module.training = mode


@contextmanager
def _dropping(tuner: MoteModel) -> Iterator[None]:
    """Drop every step that can be dropped; questions go where they go at inference."""
    routing, base = tuner.routing, cast(Any, tuner.model)
    dropout, name = routing.step_dropout, cast(str, routing.active)
    config = routing.configs[name]
    routing.step_dropout = tuple(1.0 if p else 0.0 for p in dropout)
    routing.configs[name] = copy.copy(config)
    routing.configs[name].question_routing = "mean"
    base.training = True  # of this module alone: what routes, not what drops activations
    try:
        yield
    finally:
        base.training = False
        routing.configs[name], routing.step_dropout = config, dropout


def _chain(tuner: MoteModel, with_markers: bool = True) -> Tensor:
    """A chain with all steps, shape (1, T), of tokens from the middle of the table; the base model has no markers."""
    vocabulary: StepVocabulary = tuner.routing.vocabulary
    quarter = cast(Any, tuner.model).config.get_text_config().vocab_size // 4
    markers = vocabulary.marker_ids
    words = (quarter + (37 * i + 11 * i * i) % quarter for i in range(10**6))
    plain = (word for word in words if word not in markers)
    tokens = [next(plain) for _ in range(_QUESTION)]
    for step in range(vocabulary.num_steps):
        tokens += [markers[2 * step], *(next(plain) for _ in range(_STEP)), markers[2 * step + 1]]
    if not with_markers:
        tokens = [next(plain) if token in markers else token for token in tokens]
    return torch.tensor([tokens], device=tuner.model.device)
