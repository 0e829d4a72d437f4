"""Lines about one loaded model: what its layers, masks, caches and documents do to a short chain.

Experts are random meanwhile, so that every one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import GenerationConfig

from axolotl_mote.chain.steps import IGNORE_INDEX
from axolotl_mote.doctor.comparing import Comparison, compare, compare_named, judge
from axolotl_mote.doctor.lines import FAILED, NOT_APPLICABLE, OK, Finding, NotTestedError
from axolotl_mote.doctor.probes import (
    SHARED,
    dropping,
    evaluating,
    expert_layers,
    gradients,
    idle_experts,
    on_device,
    probe_chain,
    random_experts,
    training,
    wrong_route,
)
from axolotl_mote.doctor.session import Session
from axolotl_mote.model.adapter import MoteLinear, MoteModel
from axolotl_mote.model.compat import attention_implementation
from axolotl_mote.model.loss import shift
from axolotl_mote.model.routed import start_routing, stop_routing
from axolotl_mote.model.selfcheck import check_generation, check_training
from axolotl_mote.training.base_model import compile_layers

_BATCHES = 8  # in which packed documents are looked for
_NAMED = 3  # layers that are named


def check_model(session: Session) -> Finding:
    """The base model of the configuration, with the adapter, passes the self-check of training and of ``load_mote``."""
    tuner = session.tuner
    with session.precision():
        check_training(tuner)
        check_generation(tuner)
    base, layers = tuner.model, expert_layers(tuner)
    trained = sum(p.numel() for p in tuner.parameters() if p.requires_grad)
    total = sum(p.numel() for p in tuner.parameters())
    checked = "causality, loss" + (", step dropout" if any(tuner.routing.step_dropout) else "") + ", cache"
    return Finding(
        OK,
        f"family {base.config.model_type}, {str(base.dtype).removeprefix('torch.')} on {base.device}, attention "
        f"{attention_implementation(base.config)}; self-check right: {checked}; experts on {len(layers)} layers, "
        f"{trained / 1e6:.1f} of {total / 1e6:.1f} million parameters are trained",
        figures={"layers": float(len(layers)), "trained": float(trained), "parameters": float(total)},
    )


# --- routing --------------------------------------------------------------------------------------------------------


def check_routing(session: Session) -> Finding:
    """Every layer's update, token by token, against that of the expert of the token's step, multiplied by hand."""
    tuner, vocabulary = session.tuner, session.codec.vocabulary
    tokens = probe_chain(session).tokens()
    right = torch.tensor(vocabulary.step_ids(tokens))
    late = torch.cat([right[:1], right[:-1]])  # as if a token were routed by the step before it
    updates: dict[str, Tensor] = {}
    found: list[tuple[str, Comparison, str]] = []

    def keep(name: str, _: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        updates[name] = output.detach()  # not the difference of two outputs: some are large, and would round it off

    def watch(name: str, layer: MoteLinear, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, update = args[0], updates[name]
        expected, wrong = (_update_by_hand(tuner, layer, x, steps.to(x.device)) for steps in (right, late))
        found.append((name, compare(update, expected, wrong, session.exact), "a route one token late"))
        alone = layer.base_layer(x)
        found.append(
            (name, compare(output, alone + update.to(alone.dtype), alone, session.exact), "leaving the update out")
        )

    hooks = []
    for name, layer in expert_layers(tuner).items():
        hooks.append(cast(Any, layer.lora_B["default"]).register_forward_hook(partial(keep, name)))
        hooks.append(layer.register_forward_hook(partial(watch, name)))
    try:
        with random_experts(tuner), evaluating(tuner), session.precision():
            tuner(input_ids=on_device(session, tokens), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    name, comparison, fault = max(found, key=lambda one: one[1].difference / max(one[1].limit, 1e-12))
    return judge(
        comparison,
        f"{len(found) // 2} layers, the worst is {name}",
        f"{name} does not add the update of the expert of each token's step",
        fault,
        "lora_target_modules",
    )


def _update_by_hand(tuner: MoteModel, layer: MoteLinear, x: Tensor, steps: Tensor) -> Tensor:
    """s * (w B_k A_k x + (1 - w) B_shared A_shared x) for every token, (1, T, D) -> (1, T, D_out), in float32.

    A question's token has the mean of all k, or the shared expert alone with ``question_routing: shared``.
    """
    config = tuner.routing.configs["default"]
    a = cast(Any, layer.lora_A["default"]).weight.float()
    b = cast(Any, layer.lora_B["default"]).weight.float()
    r, count = config.r, config.num_steps
    blocks = [slice(k * r, (k + 1) * r) for k in range(count + 1)]
    with torch.autocast(x.device.type, enabled=False):
        each = torch.stack([(x[0].float() @ a[block].T) @ b[:, block].T for block in blocks])  # (S + 1, T, D_out)
        share = torch.zeros(count + 1, len(steps), device=x.device)
        share[count] = 1 - config.expert_weight
        for k in range(1, count + 1):
            share[k - 1] = config.expert_weight * (steps == k)
            if config.question_routing != "shared":
                share[k - 1] += config.expert_weight / count * (steps == 0)
        return config.scaling * (share.unsqueeze(-1) * each).sum(0).unsqueeze(0)


def check_gradients(session: Session) -> Finding:
    """Of chains that lack one step: exactly no gradient for its expert, some in every layer for all with a weight."""
    tuner, vocabulary, probe = session.tuner, session.codec.vocabulary, probe_chain(session)
    config = tuner.routing.configs["default"]
    layers, faults = expert_layers(tuner), []
    idle = idle_experts(config.expert_weight, vocabulary.steps)
    with random_experts(tuner), training(tuner), dropping(tuner, 0):
        for absent in range(vocabulary.num_steps + 1):
            tokens = probe.step_tokens(without=absent)
            if not tokens:
                continue
            found = gradients(session, on_device(session, tokens))
            for number, step in enumerate([*vocabulary.steps, SHARED], start=1):
                learns = _layers_with_gradient(found, layers, number - 1, config.r)
                if number == absent and learns:
                    faults.append(f"the expert of {step} gets a gradient from chains without it ({learns[0]})")
                elif number != absent and step not in idle and len(learns) < len(layers):
                    rest = sorted(set(layers) - set(learns))
                    faults.append(f"{step} gets no gradient in {len(rest)} layers ({', '.join(rest[:_NAMED])})")
    if faults:
        return Finding(FAILED, "; ".join(dict.fromkeys(faults)), "lora_target_modules")
    others = f"; {', '.join(sorted(idle))} without a weight: {config.expert_weight:g}" if idle else ""
    return Finding(
        OK, f"{len(layers)} layers: an absent step's expert gets exactly 0, every other expert some everywhere{others}"
    )


def _layers_with_gradient(found: dict[str, Tensor], layers: dict[str, MoteLinear], block: int, r: int) -> list[str]:
    """Layers in which a block of ranks has a gradient that is not exactly zero, in A or in B."""
    rows = slice(block * r, (block + 1) * r)
    learns = []
    for name in layers:
        a = next(g for key, g in found.items() if key.endswith(f"{name}.lora_A.default.weight"))
        b = next(g for key, g in found.items() if key.endswith(f"{name}.lora_B.default.weight"))
        if a[rows].any() or b[:, rows].any():
            learns.append(name)
    return learns


# --- masks, recomputation, packing ----------------------------------------------------------------------------------


def check_step_dropout(session: Session) -> Finding:
    """Change a token of a dropped step: nothing that follows the step may change."""
    tuner, vocabulary, probe = session.tuner, session.codec.vocabulary, probe_chain(session)
    dropout = tuner.routing.step_dropout
    if not any(dropout):
        return Finding(NOT_APPLICABLE, "mote.step_dropout is 0, or no step stands before the answer")
    tokens = probe.tokens()
    steps = vocabulary.step_ids(tokens)
    findings = []
    for step, probability in enumerate(dropout, start=1):
        if not probability:
            continue
        inside = [place for place, own in enumerate(steps) if own == step][1:-1]  # without its markers
        after = max(inside) + 2
        changed = list(tokens)
        for place in inside:
            changed[place] = probe.texts[step % len(probe.texts)][0] if len(probe.texts) > 1 else probe.question[-1]
        one, two = on_device(session, tokens), on_device(session, changed)
        with random_experts(tuner), evaluating(tuner), session.precision():
            with dropping(tuner, step):
                found, expected = (tuner(input_ids=ids, use_cache=False).logits[:, after:] for ids in (two, one))
            with dropping(tuner, 0):
                seen, plain = (tuner(input_ids=ids, use_cache=False).logits[:, after:] for ids in (two, one))
        comparison = compare(found, expected, expected.float() + (seen.float() - plain.float()), session.exact)
        name, attention = vocabulary.steps[step - 1], attention_implementation(tuner.model.config)
        findings.append(
            judge(
                comparison,
                f"{name}, through {attention}",
                f"tokens after {name} see it although it is dropped, through {attention}",
                "a step that is not dropped",
                "attn_implementation",
            )
        )
    return _worst_of(findings)


def _worst_of(findings: list[Finding]) -> Finding:
    bad = [finding for finding in findings if finding.verdict != OK]
    return bad[0] if bad else Finding(OK, "; ".join(f.text for f in findings), figures=findings[0].figures)


def check_checkpointing(session: Session) -> Finding:
    """Gradients with and without recomputation, another chain's forward in between."""
    tuner, probe = session.tuner, probe_chain(session)
    base = cast(Any, tuner.model)
    kwargs = dict(session.cfg.gradient_checkpointing_kwargs or {"use_reentrant": False})
    base.gradient_checkpointing_disable()
    tokens, other = on_device(session, probe.tokens()), on_device(session, probe.tokens(without=1))
    steps = torch.tensor([session.codec.vocabulary.step_ids(tokens[0].tolist())], device=tokens.device)

    def between() -> None:
        with session.precision():
            tuner(input_ids=other, use_cache=False)

    with random_experts(tuner), training(tuner):
        expected = gradients(session, tokens)
        wrong = gradients(session, tokens, wrong_route(steps, session.codec.vocabulary.num_steps))
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        base.enable_input_require_grads()
        try:
            found = gradients(session, tokens, between=between)
        finally:
            base.disable_input_require_grads()
            base.gradient_checkpointing_disable()
    reentrant = str(bool(kwargs.get("use_reentrant"))).lower()
    used = "" if session.validated.gradient_checkpointing else "off in this configuration; "
    return judge(
        compare_named(found, expected, wrong, session.exact),
        f"{used}with use_reentrant: {reentrant}",
        f"gradients are others when layers are computed again with use_reentrant: {reentrant}",
        "a wrong route",
        "gradient_checkpointing",
    )


def check_packing(session: Session) -> Finding:
    """Losses of a packed batch, as the trainer makes it, against those of its documents alone, in training mode."""
    if not session.cfg.sample_packing:
        return Finding(NOT_APPLICABLE, "sample_packing is off")
    tuner = session.tuner
    batch, bounds = _packed_batch(session)
    ids, labels = batch["input_ids"], batch["labels"]
    found, expected, wrong = [], [], []
    with random_experts(tuner), training(tuner), torch.no_grad(), session.trainer.compute_loss_context_manager():
        packed = session.trainer.compute_loss(session.trainer.model, dict(batch), return_outputs=True)[1].loss
        for row, spans in bounds.items():
            targets = shift(labels[row : row + 1], IGNORE_INDEX)
            whole = tuner(input_ids=ids[row : row + 1], targets=targets).loss[0]  # as one document
            for start, end in spans:
                alone = tuner(input_ids=ids[row : row + 1, start:end], targets=targets[:, start:end]).loss[0]
                found.append(packed[row, start : end - 1])
                expected.append(alone[:-1])
                wrong.append(whole[start : end - 1])
    comparison = compare(torch.cat(found), torch.cat(expected), torch.cat(wrong), session.exact)
    count = sum(map(len, bounds.values()))
    return judge(
        comparison,
        f"{count} documents in {len(bounds)} rows",
        f"losses of {count} packed documents are not those of the documents alone",
        "documents that see each other",
        "sample_packing",
    )


def _packed_batch(session: Session) -> tuple[dict[str, Any], dict[int, list[tuple[int, int]]]]:
    """The first packed batch with several documents in a row, and where they stand: row -> (start, end) of each."""
    for batch, _ in zip(session.trainer.get_train_dataloader(), range(_BATCHES), strict=False):
        if "position_ids" not in batch:
            break
        bounds = {}
        positions = batch["position_ids"].expand(batch["input_ids"].shape)
        for row in range(len(positions)):
            starts = [0, *(1 + (positions[row].diff() != 1).nonzero().flatten()).tolist()]
            spans = list(zip(starts, [*starts[1:], positions.shape[1]], strict=True))
            bounds[row] = [(s, e) for s, e in spans if (batch["labels"][row, s:e] != IGNORE_INDEX).any()]
        bounds = {row: spans for row, spans in bounds.items() if len(spans) > 1}
        if bounds:
            return batch, bounds
    raise NotTestedError(f"no row of the first {_BATCHES} batches holds several chains: raise sequence_len")


# --- inference ------------------------------------------------------------------------------------------------------


def check_generation_routes(session: Session) -> Finding:
    """Logits of a chain that ``generate`` is led through with a cache, against one forward over all of it."""
    tuner, vocabulary, probe = session.tuner, session.codec.vocabulary, probe_chain(session)
    tokens = on_device(session, probe.tokens())
    start, end = len(probe.question), tokens.shape[1]
    steps = torch.tensor([vocabulary.step_ids(tokens[0].tolist())], device=tokens.device)
    settings = GenerationConfig(
        max_new_tokens=end - start,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    base = cast(Any, tuner.model)
    own, base.generation_config = base.generation_config, settings
    try:
        with random_experts(tuner), evaluating(tuner), session.precision():
            said = base.generate(
                input_ids=tokens[:, :start],
                attention_mask=torch.ones_like(tokens[:, :start]),
                prefix_allowed_tokens_fn=lambda _, ids: [int(tokens[0, len(ids)])],
            )
            whole, wrong = (
                tuner(input_ids=tokens, use_cache=False, **options).logits[0, start - 1 : -1]
                for options in ({}, {"step_ids": wrong_route(steps, vocabulary.num_steps)})
            )
    finally:
        base.generation_config = own
    return judge(
        compare(torch.cat(said.logits), whole, wrong, session.exact),
        f"{end - start} tokens through {vocabulary.num_steps} steps",
        "generation with a cache gives other logits than one forward",
        "a wrong route",
        "base_model",
    )


def check_disabled(session: Session) -> Finding:
    """Logits with the adapter disabled, against those of the base layers put back into their places."""
    tuner = session.tuner
    tokens = on_device(session, probe_chain(session).question)
    with random_experts(tuner), evaluating(tuner), session.precision():
        routed = tuner(input_ids=tokens, use_cache=False).logits
        with session.trainer.model.disable_adapter():
            found = session.trainer.model(input_ids=tokens, use_cache=False).logits
        with _taken_out(tuner):
            expected = tuner.model(input_ids=tokens, use_cache=False).logits
    width = expected.shape[-1]
    return judge(
        compare(found[..., :width], expected, routed[..., :width], session.exact),
        f"{width} logits of {tokens.shape[1]} tokens",
        "disable_adapter() leaves something of the adapter",
        "the adapter",
        "base_model",
    )


@contextmanager
def _taken_out(tuner: MoteModel) -> Iterator[None]:
    """The layers of the base model in the places of those that the adapter put there, and its own forward."""
    base, routing = tuner.model, tuner.routing
    places = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    stop_routing(base)
    try:
        for name, module in places.items():
            base.set_submodule(name, module.get_base_layer())
        yield
    finally:
        for name, module in places.items():
            base.set_submodule(name, module)
        start_routing(base, routing)


# --- compilation ----------------------------------------------------------------------------------------------------


def check_compile(session: Session) -> Finding:
    """Gradients of compiled layers against those of uncompiled ones; the model is loaded anew afterwards."""
    asked = session.options.compile  # the plugin turns torch_compile into it
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "off" or (asked == "auto" and device != "cuda"):
        return Finding(NOT_APPLICABLE, f"mote.compile: {asked} compiles nothing on {device}")
    tuner, probe, vocabulary = session.tuner, probe_chain(session), session.codec.vocabulary
    tokens = on_device(session, probe.tokens())
    steps = torch.tensor([vocabulary.step_ids(tokens[0].tolist())], device=tokens.device)
    try:
        with random_experts(tuner), training(tuner):
            expected = gradients(session, tokens)
            wrong = gradients(session, tokens, wrong_route(steps, vocabulary.num_steps))
            compile_layers(session.trainer.model, session.validated)
            found = gradients(session, tokens)
    finally:
        session.forget("model")
    return judge(
        compare_named(found, expected, wrong, session.exact),
        "every decoder layer",
        "compiled layers give other gradients",
        "a wrong route",
        "mote.compile",
    )


CHECKS: dict[str, Callable[[Session], Finding]] = {
    "model": check_model,
    "routing": check_routing,
    "gradients": check_gradients,
    "step-dropout": check_step_dropout,
    "checkpointing": check_checkpointing,
    "packing": check_packing,
    "generation": check_generation_routes,
    "disabled": check_disabled,
    "compile": check_compile,
}
