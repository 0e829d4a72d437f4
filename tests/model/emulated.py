"""A device without hardware: runs the model on it, case by case, and prints what went wrong as JSON.

torch's PrivateUse1 backend gives autograd a second device, and FakeTensorMode gives every operation its shapes, dtypes
and device without computing anything. What a value would decide cannot happen here, so ``.item()``, ``nonzero`` and the
like raise an error; ``Watch`` adds the copies between the CPU and the device, which FakeTensorMode lets pass.

A backend is registered once per process and cannot be taken back, and torch.accelerator would see it: this file is run
by test_device.py as a process of its own. Fake tensors with device "cuda" need no registration, but without CUDA
autograd ends the process ("not linked with support for cuda devices").

What the backend lacks is emulated here: casts under autocast for the operations that matter (a part of CUDA's lists),
``Module.to`` for fake tensors, and flex_attention without its check of the device and without compilation.

    python emulated.py                  # all cases
    python emulated.py item gemma3      # those with these words in their name
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
import transformers.integrations.flex_attention
from kit import FAMILIES, add_mote_adapter, base_model, chain, mote_config, mote_model, randomize, takes
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._higher_order_ops import flex_attention as flex_operator
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from axolotl_mote.model import adapter, markers, routed
from axolotl_mote.model.loss import build_targets, scored_positions, step_sums, weighted_loss
from axolotl_mote.model.routing import step_ids_from_tokens

DEVICE = "emulated"


class Case(NamedTuple):
    """One model and the way it is trained."""

    family: str
    attention: str = "sdpa"
    half: bool = False
    checkpointing: bool = False
    autocast: bool = False
    late: bool = False  # the adapter is added when the model is on the device already

    @property
    def name(self) -> str:
        """Such as gemma2-flex_attention-half-late."""
        return "-".join([self.family, self.attention, *(word for word in self._fields[2:] if getattr(self, word))])


def _cases() -> Iterator[Case]:
    """All families with both kinds of attention; for each kind, any three of the four options in every combination.

    Eight rows for four options: the fourth is the parity of the others.
    """
    for number, family in enumerate(FAMILIES):
        bits = [bool(number >> bit & 1) for bit in range(3)]
        options = [*bits, sum(bits) % 2 == 1]
        yield Case(family, "sdpa" if takes(family, "sdpa") else "eager", *options)
        yield Case(family, "flex_attention", *(not option for option in options))


CASES = {case.name: case for case in _cases()}


# --- the device -----------------------------------------------------------------------------------------------------


class _Backend(_DummyBackendModule):
    """The module ``torch.emulated``: what autocast and checkpoint ask of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, *_: Any) -> None:
        pass


_LOWER = ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention")
_FLOAT32 = ("softmax.int", "log_softmax.int", "cross_entropy_loss", "pow.Tensor_Scalar", "rsqrt", "sum")
_LIBRARIES: list[torch.library.Library] = []  # a library that is collected takes its kernels with it


def _no_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(DispatchKey.AutocastPrivateUse1))


def _casting(operator: Any, dtype: torch.dtype) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        with _no_autocast():
            return operator(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

    return kernel


def _emulate_autocast() -> None:
    everything = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel)
    aten = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for names, dtype in ((_LOWER, torch.bfloat16), (_FLOAT32, torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            aten.impl(name, _casting(getattr(getattr(torch.ops.aten, packet), overload or "default"), dtype))

    @flex_operator.py_impl(DispatchKey.AutocastPrivateUse1)
    def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Any:
        with _no_autocast():
            return flex_operator(*(x.to(torch.bfloat16) for x in (query, key, value)), *args)

    _LIBRARIES.extend([everything, aten])


def _emulate_flex() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: Any) -> Any:
        # Inside a trace flex_attention calls its operator; outside it would compile it first.
        with patch("torch.compiler.is_dynamo_compiling", lambda: True):
            return flex.flex_attention(query, key, value, **kwargs)

    flex._validate_device = lambda *_: None
    transformers.integrations.flex_attention.compile_friendly_flex_attention = attend


_moved: dict[Any, tuple[Tensor, nn.Parameter]] = {}


def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply``, which cannot swap fake tensors; here tied parameters stay tied because they are remembered."""
    for child in module.children():
        child._apply(convert)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = convert(parameter)
            key = (id(parameter), moved.device, moved.dtype)
            _moved.setdefault(key, (parameter, nn.Parameter(moved, parameter.requires_grad)))
            module._parameters[name] = _moved[key][1]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


def emulate() -> None:
    """Make the device known to this process."""
    _setup_privateuseone_for_python_backend(DEVICE, backend_module=_Backend())
    _emulate_autocast()
    _emulate_flex()
    nn.Module._apply = _apply  # type: ignore[method-assign]
    # torch.tensor(..., device=...) would ask the backend for memory.
    FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore[assignment]


_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class HostCopy(Exception):
    """Data crossed between the CPU and the device."""


class Watch(TorchDispatchMode):
    """Raises on a copy from the device, and once ``steady`` also on a copy to it and on any work on CPU tensors.

    Python numbers, and tensors without dimensions in arithmetic, travel with the kernel and are not copies.
    """

    supports_higher_order_operators = True
    steady = False
    error: Exception | None = None
    """The first one in a thread of autograd's: an error that leaves such a thread ends the process."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._checked(func, args, kwargs or {})
        except Exception as error:
            if threading.current_thread() is threading.main_thread():
                raise
            self.error = self.error or error
            if isinstance(error, HostCopy):
                return func(*args, **(kwargs or {}))
            if isinstance(error, DataDependentOutputException):
                return 1
            traceback.print_exc()  # the last words of the process
            raise

    def _checked(self, func: Any, args: Any, kwargs: Any) -> Any:
        outputs = func(*args, **kwargs)
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        after = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        on_host = [tensor for tensor in before + after if tensor.device.type == "cpu"]
        if any(t.device.type == "cpu" for t in after) and any(t.device.type == DEVICE for t in before):
            raise HostCopy(f"{func} copies from the device")
        copies = any(t.device.type == DEVICE for t in after) and func in _COPIES
        if self.steady and any(tensor.dim() or copies for tensor in on_host):
            raise HostCopy(f"{func} uses a CPU tensor of shape {[tuple(tensor.shape) for tensor in on_host]}")
        return outputs


# --- one case -------------------------------------------------------------------------------------------------------


def batches() -> list[dict[str, Tensor]]:
    """A packed row, and two rows with padding on the left; real tensors, as a collator makes them."""
    rows = [chain(seed=seed, guidance=3 * (seed % 2)) for seed in range(4)]
    packed = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[position for row in rows for position in range(len(row))]])
    length = max(map(len, rows))
    padded = torch.tensor([[0] * (length - len(row)) + row for row in rows[:2]])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows[:2]])
    found = [{"input_ids": packed, "position_ids": positions}, {"input_ids": padded, "attention_mask": mask}]
    for batch in found:
        steps = step_ids_from_tokens(batch["input_ids"], mote_config(), batch.get("position_ids"))
        batch["labels"] = batch["input_ids"].where(steps > 0, -100)
        batch["scored"] = scored_positions(batch["labels"], multiple=8)
    return found


def build(case: Case) -> Any:
    """The model of a case, on the device."""
    base = base_model(case.family, case.attention).to(torch.bfloat16 if case.half else torch.float32)
    if case.late:
        base = base.to(DEVICE)
    model = add_mote_adapter(base, mote_config(question_routing="random"))
    randomize(model)
    model = model.to(DEVICE)
    mote_model(model).routing.step_dropout = (0.5, 0.5)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def train(model: Any, batch: dict[str, Tensor], case: Case, step: int) -> None:
    """One step as the trainer does it, from the tokens to the gradients and the sums by step."""
    tuner = mote_model(model)
    tuner.routing.step = step
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    steps = step_ids_from_tokens(batch["input_ids"], tuner.routing.vocabulary, batch.get("position_ids"))
    targets = build_targets(batch["labels"], steps, (1.0, 1.0, 0.5, 2.0)).to(torch.device(DEVICE))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=case.autocast):
        losses = model(**inputs, step_ids=steps, targets=targets.ids).loss
    total = torch.zeros((), device=DEVICE)
    total += targets.weights.sum()
    weighted_loss(losses, targets.weights, total, ranks=2).backward()
    step_sums(losses.detach(), targets.steps, num_steps=3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.device.type != DEVICE):
            raise AssertionError(f"{name} has no gradient on the device")
        parameter.grad = None


@torch.no_grad()
def evaluate(model: Any, batch: dict[str, Tensor], case: Case) -> None:
    """Losses and logits in evaluation mode."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "scored")}
    if case.attention == "flex_attention":  # transformers' own mask for it asks whether there is any padding
        inputs.pop("attention_mask", None)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=case.autocast):
        model(**inputs, scored=batch["scored"], targets=batch["labels"])
        model(**inputs, use_cache=False)


def run(case: Case) -> None:
    """Train and evaluate; the first step may copy tables to the device, later ones nothing."""
    real = batches()
    _moved.clear()
    with FakeTensorMode() as mode, Watch() as watch, patch("axolotl_mote.model.loss.chunk_size", lambda _: 16):
        _train_and_evaluate(case, watch, [{k: mode.from_tensor(v) for k, v in batch.items()} for batch in real])


def _train_and_evaluate(case: Case, watch: Watch, collated: list[dict[str, Tensor]]) -> None:
    model = build(case)
    if case.autocast:
        with torch.autocast(DEVICE, torch.bfloat16):
            assert F.linear(*torch.ones(2, 3, 3, device=DEVICE)).dtype == torch.bfloat16
    on_device = [{key: value.to(DEVICE) for key, value in batch.items()} for batch in collated]
    model.train()
    # With its own masks a model of transformers may look into them, and spares fake tensors the check. While
    # step dropout gives the mask it must not: here it cannot tell fake tensors from others.
    with patch("transformers.masking_utils.is_tracing", lambda _=None: False):
        for step, batch in enumerate([on_device[0], *on_device]):
            watch.steady = step > 0
            train(model, batch, case, step)
            if watch.error is not None:
                raise watch.error
    model.eval()
    for batch in on_device:
        evaluate(model, batch, case)


# --- faults, to see them found --------------------------------------------------------------------------------------


@contextmanager
def in_routing(fault: Callable[[Tensor], Any]) -> Iterator[None]:
    """Run a fault on the tokens' positions, in the part of the forward before the layers."""
    original = routed.positions_without_dropped

    def positions(*args: Any, **kwargs: Any) -> Tensor:
        found = original(*args, **kwargs)
        result = fault(found)
        return result if isinstance(result, Tensor) and result.shape == found.shape else found

    with patch.object(routed, "positions_without_dropped", positions):
        yield


@contextmanager
def in_layers(fault: Callable[[Tensor], Any]) -> Iterator[None]:
    """Run a fault on the output of every adapted layer."""
    original = adapter.MoteLinear.forward

    def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = original(layer, x, *args, **kwargs)
        result = fault(output)
        return result if isinstance(result, Tensor) and result.shape == output.shape else output

    with patch.object(adapter.MoteLinear, "forward", forward):
        yield


def _item_in_backward(output: Tensor) -> None:
    output.register_hook(lambda gradient: gradient.sum().item() and None)


def _gate_on_cpu(routing: Any, step_ids: Tensor) -> None:
    routing.gate = torch.zeros(*step_ids.shape, 8)


def _new_ids(layer: Any, name: str, device: torch.device) -> Tensor:
    return torch.tensor(layer.marker_ids[name], device=device)


SYNCHRONIZED, DYNAMIC = "DataDependentOutputException", "DynamicOutputShapeException"
MISMATCH, COPIED = "FakeTensorDeviceMismatchError", "HostCopy"

FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "tensor on the CPU": (lambda: in_routing(lambda x: x + torch.zeros(x.shape, dtype=x.dtype)), MISMATCH),
    "tensor on the CPU in a layer": (lambda: in_layers(lambda x: x * torch.ones(x.shape[-1])), MISMATCH),
    "index on the CPU": (lambda: in_routing(lambda x: x[torch.zeros(len(x), dtype=torch.int64)]), COPIED),
    "gate on the CPU": (lambda: patch.object(routed.Routing, "set_gate", _gate_on_cpu), COPIED),
    "marker ids made anew": (lambda: patch.object(markers.MarkerEmbedding, "_ids", _new_ids), COPIED),
    "number made a tensor": (lambda: in_layers(lambda x: x * torch.tensor(2.0, device=x.device)), COPIED),
    "item": (lambda: in_routing(lambda x: x.max().item()), SYNCHRONIZED),
    "item in a layer": (lambda: in_layers(lambda x: x.sum().item()), SYNCHRONIZED),
    "item in the backward pass": (lambda: in_layers(_item_in_backward), SYNCHRONIZED),
    "truth value": (lambda: in_routing(lambda x: x if (x > 3).any() else x + 1), SYNCHRONIZED),
    "tolist": (lambda: in_routing(lambda x: x.tolist()), SYNCHRONIZED),
    "cpu": (lambda: in_routing(lambda x: x.cpu()), COPIED),
    "nonzero": (lambda: in_routing(lambda x: x.nonzero()), DYNAMIC),
    "boolean index": (lambda: in_routing(lambda x: x[x > 3]), DYNAMIC),
    "unique": (lambda: in_routing(lambda x: x.unique()), DYNAMIC),
    "repeat_interleave": (lambda: in_routing(lambda x: x[0].repeat_interleave(x[0])), DYNAMIC),
    "arange of a tensor": (lambda: in_routing(lambda x: torch.arange(x.max(), device=x.device)), SYNCHRONIZED),
}
"""By name: puts the fault into a forward, and the error that must come."""

PLAIN = Case("llama")


def outcome(case: Case) -> str:
    """Run a case: empty, or the error and the line of ours that it came from."""
    try:
        run(case)
    except Exception as error:  # noqa: BLE001 - whatever a case raises is its outcome
        package = str(Path(adapter.__file__).parent)
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)]
        where = f" at {ours[-1].filename}:{ours[-1].lineno}: {ours[-1].line}" if ours else ""
        return f"{type(error).__name__}: {str(error)[:1000]}{where}"
    return ""


def main(words: list[str]) -> None:
    """Run cases and faults; print their outcomes by name as the last line."""

    def wanted(name: str) -> bool:
        return not words or any(word in name for word in words)

    emulate()
    torch.set_num_threads(1)  # nothing is computed
    outcomes = {name: outcome(case) for name, case in CASES.items() if wanted(name)}
    for name, (fault, _) in FAULTS.items():
        if wanted(name):
            with fault():
                outcomes[name] = outcome(PLAIN)
    print(json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
