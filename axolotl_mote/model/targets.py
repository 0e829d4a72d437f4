"""Which layers of a base model get experts.

A configuration names layers by suffixes, which other parts of a model share: vision towers, routers, heads. What
cannot be adapted is left out with a warning and recorded in the configuration's ``exclude_modules``: whatever loads the
adapter later reads it there. No steps, no adapter weights.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from axolotl_mote.model.compat import bypasses_lora, eager_flex_attention, text_decoder
from axolotl_mote.model.config import MoteConfig

LOG = logging.getLogger("axolotl.mote")  # below axolotl's logger, so that its handlers print it

_TOKENS = 16  # of the run that looks for gradients
_NOTED_SHARE = 0.01  # of a model's weights; less than this in no linear layer is not worth a warning


def choose_targets(model: PreTrainedModel, config: MoteConfig, *, run: bool = False) -> None:
    """Leave out the named layers that cannot have experts; one warning says which and why.

    For a Gemma 3 with ``target_modules=["q_proj"]`` those of its vision tower are left out.

    Args:
        model: The base model, with or without adapters.
        config: Names the layers; what is left out is added to its ``exclude_modules``.
        run: Also run the model once, forward and backward on a few tokens, and leave out layers without a gradient.
            It is skipped where weights are not there: on the meta device, or partitioned by DeepSpeed ZeRO-3.

    Raises:
        ValueError: If no named layer is left, or the model cannot run.
    """
    named = _named_layers(model, config)
    reasons = _unfit(model, named)
    rest = [name for name in named if name not in reasons]
    if run and rest:
        reasons |= _seen_unfit(model, rest)
    if len(reasons) == len(named):
        raise ValueError(_nothing_left(model, config, reasons))
    if reasons:
        LOG.warning("%s: named layers that get no experts: %s.", type(model).__name__, _grouped(reasons))
        _exclude(config, _shortened(reasons, named))


def warn_of_fused_weights(model: PreTrainedModel) -> None:
    """Warn where a noteworthy part of the weights is in no linear layer, as the experts of most MoE bases.

    Args:
        model: The base model, without an adapter.
    """
    inside = _text_modules(model)
    owners: set[nn.Module] = set()
    names: dict[str, None] = {}
    fused = total = 0
    for place, module in model.named_modules():
        if _has_sides(module):  # quantized weights have another shape
            total += cast(Any, module).in_features * cast(Any, module).out_features
            continue
        for name, parameter in module.named_parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps it there
            total += math.prod(shape)
            of_torch = isinstance(module, nn.Embedding) or type(module).__module__.startswith("torch.")
            if module in inside and not of_torch and len(shape) > 1:
                fused += math.prod(shape)
                owners.add(module)
                names[f"{place.rpartition('.')[2]}.{name}"] = None
    if fused > _NOTED_SHARE * total:
        LOG.warning(
            "%s: %.1f %% of the weights are in no linear layer and get no experts: %s (%d modules).",
            type(model).__name__,
            100 * fused / total,
            ", ".join(names),
            len(owners),
        )


def _text_modules(model: PreTrainedModel) -> set[nn.Module]:
    """The modules of the text decoder, without parts in it that read images or sound."""
    decoder = text_decoder(model)
    inside, embedding = set(decoder.modules()), model.get_input_embeddings()
    for part in decoder.modules():
        if isinstance(part, PreTrainedModel) and part.main_input_name != "input_ids":
            own = set(part.modules())
            inside -= set() if embedding in own else own
    return inside


# --- what is named --------------------------------------------------------------------------------------------------


def _named_layers(model: PreTrainedModel, config: MoteConfig) -> dict[str, nn.Module]:
    """The modules that a configuration names and does not exclude, as PEFT matches them, without adapters on them."""
    if config.target_modules is None:
        return {}
    modules: dict[str, nn.Module] = {}
    below: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not name.startswith(below):
            tuned = isinstance(module, BaseTunerLayer)
            below = (*below, f"{name}.") if tuned else below
            modules[name] = module.get_base_layer() if tuned else module
    wanted: LoraConfig = config
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        head = model.get_output_embeddings()
        heads = [name for name in modules if model.get_submodule(name) is head]
        linear = [
            name for name, layer in modules.items() if isinstance(layer, (nn.Linear, Conv1D)) and name not in heads
        ]
        wanted = LoraConfig(target_modules=linear, exclude_modules=config.exclude_modules)
    return {name: module for name, module in modules.items() if check_target_module_exists(wanted, name)}


# --- what is left out -----------------------------------------------------------------------------------------------


def _unfit(model: PreTrainedModel, named: Mapping[str, nn.Module]) -> dict[str, str]:
    """Reasons, by name, why layers can have no experts whatever the model does with them."""
    inside = _text_modules(model)
    files = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    reasons: dict[str, str] = {}
    for name, layer in named.items():
        if model.get_submodule(name) not in inside:
            reasons[name] = "outside of the text decoder"
        elif not _is_linear(layer, files):
            reasons[name] = f"not linear: {type(layer).__name__}"
        elif bypasses_lora(model, name.rpartition(".")[2]):
            reasons[name] = "fused kernels read its weight alone"
    return reasons


def _has_sides(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _is_linear(layer: nn.Module, files: set[str]) -> bool:
    """Whether a layer maps (..., D) to (..., D_out): a linear layer of torch, of quantization, or the model's own.

    Only the last kind is in doubt. The router of Llama-4 is an ``nn.Linear`` whose forward returns a pair.
    """
    sides: Any = layer
    if not _has_sides(layer):
        return False
    if type(layer).__module__ not in files or type(layer).forward is nn.Linear.forward:
        return True
    sizes = {name: getattr(one, "ds_shape", one.shape) for name, one in layer.named_parameters(recurse=False)}
    weights = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    try:
        out = functional_call(layer, weights, torch.empty(1, 2, sides.in_features, device="meta"))
    except (RuntimeError, ValueError):  # it takes another shape
        return False
    return isinstance(out, Tensor) and out.shape == (1, 2, sides.out_features)


def _seen_unfit(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """Reasons, by name, why layers can have no experts, seen in a run of the model.

    The model is asked, since families have many reasons. Mamba reads the weight of ``dt_proj`` and never calls it, a
    decoder of BART's family alone has nothing to cross-attend to, an indexer only ranks tokens: no path leads from
    their output to the logits. Some bypass a layer in training alone (AltUp of Gemma 3n, fused kernels); layers that
    training drops at random count through the others. And what runs on prompt vectors, compressed or dispatched tokens
    has no step.
    """
    if any(one.is_meta or not one.numel() for one in model.parameters()):
        return {}
    calls = _calls(model, names, training=False)
    reached = {name for name, _, gradient in calls if gradient}
    others = {_role(name) for name, tokens, _ in calls if tokens != _TOKENS}
    if not model.is_gradient_checkpointing:  # its first pass records no path
        kinds = {_kind(name) for name, _, gradient in _calls(model, names, training=True) if gradient}
        reached = {name for name in reached if _kind(name) in kinds}
    reasons = {name: "no gradient reaches them" for name in names if name not in reached}
    return reasons | {name: "they run on other tokens" for name in names if _role(name) in others}


def _calls(model: PreTrainedModel, names: Sequence[str], *, training: bool) -> list[tuple[str, int, bool]]:
    """Every call of the layers in a run: name, tokens, and whether the logits have a gradient for its output.

    Random state and modes stay as they are.
    """
    outputs: list[tuple[str, Tensor]] = []
    embedding, before = model.get_input_embeddings(), model.training
    device = embedding.weight.device
    hooks = [embedding.register_forward_hook(lambda _module, _args, out: out.requires_grad_())]
    hooks += [model.get_submodule(name).register_forward_hook(partial(_keep, outputs, name)) for name in names]
    model.train(training)
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            eager_flex_attention(model),
            _mixed_precision(model, device),
            torch.enable_grad(),
        ):
            ids = torch.arange(3, 3 + _TOKENS, device=device) % embedding.weight.shape[0]
            logits = model(input_ids=ids[None], use_cache=False).logits
            tracked = [out for _, out in outputs if out.requires_grad]
            gradients = torch.autograd.grad(logits.float().sum(), tracked, allow_unused=True) if tracked else ()
    except Exception as error:  # whatever a family raises, training would raise it
        raise ValueError(
            f"base_model must run forward and backward in {'training' if training else 'evaluation'} mode; got "
            f"{type(error).__name__}: {error} from {type(model).__name__}, without an adapter. Use another base model, "
            "or load this one without quantization."
        ) from error
    finally:
        model.train(before)
        for hook in hooks:
            hook.remove()
    reached = {id(out) for out, gradient in zip(tracked, gradients, strict=True) if gradient is not None}
    return [(name, out.shape[:-1].numel(), id(out) in reached) for name, out in outputs]


def _mixed_precision(model: nn.Module, device: torch.device) -> torch.autocast:
    """What a model needs to run whose weights are of several types, such as norms in float32 among bfloat16."""
    types = {one.dtype for one in model.parameters() if one.is_floating_point()}
    half = torch.float16 if torch.float16 in types else torch.bfloat16
    return torch.autocast(device.type, half, enabled=len(types) > 1)


def _keep(outputs: list[tuple[str, Tensor]], name: str, _module: nn.Module, _args: Any, out: Tensor) -> None:
    outputs.append((name, out))


def _role(name: str) -> str:
    """Name of a layer with its numbers after the first left out: model.layers.3.experts.*.up_proj.

    Experts of one MoE layer stand for each other, as a few tokens reach only some of them.
    """
    head, number, rest = (*re.split(r"(\.\d+\.)", name, maxsplit=1), "", "")[:3]
    return head + number + _kind(rest)


def _kind(name: str) -> str:
    """Name of a layer with all its numbers left out: model.layers.*.mlp.up_proj."""
    return re.sub(r"\b\d+\b", "*", name)


# --- what is said and recorded --------------------------------------------------------------------------------------


def _grouped(reasons: Mapping[str, str]) -> str:
    """Left-out layers by reason and suffix: "q_proj, k_proj (24 layers; outside of the text decoder)"."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name.rpartition(".")[2])
    return "; ".join(
        f"{', '.join(dict.fromkeys(ends))} ({len(ends)} {'layer' if len(ends) == 1 else 'layers'}; {reason})"
        for reason, ends in groups.items()
    )


def _nothing_left(model: PreTrainedModel, config: MoteConfig, reasons: Mapping[str, str]) -> str:
    targets = config.target_modules or []
    given = targets if isinstance(targets, str) else ", ".join(sorted(targets)) or "none"
    why = f", all of which are left out: {_grouped(reasons)}" if reasons else ", where there is no such layer"
    if any(isinstance(module, Conv1D) for module in model.modules()):
        way_out = "Its layers are of the kind Conv1D, which cannot carry experts: use another base model."
    else:
        way_out = "Set lora_target_linear: true."
    return (
        f"lora_target_modules must name linear layers of the text decoder; got {given} for {type(model).__name__}"
        f"{why}. {way_out}"
    )


def _shortened(left_out: Iterable[str], named: Iterable[str]) -> list[str]:
    """Names of left-out layers, or their suffix where every named layer of that suffix is left out."""
    gone = set(left_out)
    kept = {name.rpartition(".")[2] for name in named if name not in gone}
    ends = {name: name.rpartition(".")[2] for name in gone}
    return sorted({name if end in kept else end for name, end in ends.items()})


def _exclude(config: MoteConfig, names: list[str]) -> None:
    given = config.exclude_modules
    if isinstance(given, str):  # a regular expression for whole names
        config.exclude_modules = "|".join([given, *(rf"(.*\.)?{re.escape(name)}" for name in names)])
    else:
        config.exclude_modules = {*(given or ()), *names}
