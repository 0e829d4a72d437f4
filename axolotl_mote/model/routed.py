"""The wrapped base model: its forward routes the tokens that it is fed, and ``generate`` tells it their steps.

PEFT's wrappers call the base model directly when they generate, so routing belongs to the base model itself. It gets a
subclass of its own class, as ``torch.distributed.fsdp.fully_shard`` does it: nothing is replaced on the instance, so
copies, pickles and ``unload`` behave as for any other module. No layers, no adapter weights.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.model.attention import SegmentsHolder, attach, build_attention_mask, detach
from axolotl_mote.model.compat import cached_length, find_cache
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.markers import MarkerEmbedding, MarkerHead
from axolotl_mote.model.masks import Segments, Visibility
from axolotl_mote.model.routing import (
    document_draws,
    document_starts,
    draw_question_step,
    dropped_tokens,
    gate_table,
    positions_without_dropped,
    step_ids_from_tokens,
)


class Routing(SegmentsHolder):
    """The routing state of one model: set by every forward, read by every layer.

    Forwards of several threads take turns, so each reads its own state, and one without gradients leaves the state as
    it found it. For layers that are recomputed in the backward pass, the state of their forward comes back when the
    pass begins, whatever ran in between and in whichever thread it runs. The pass itself takes no turn: while one
    thread trains with gradient checkpointing, no other may run the model.

    Attributes:
        configs: Configuration of every adapter, by name.
        gate: Weight of every rank for every token of the current forward, shape (B, T, R), float32; None outside of
            forwards, and in one whose adapter is disabled.
        step_ids: Steps of all tokens so far, the cached ones too, while ``generate`` continues a cache; else None.
        lock: Held by a forward while it runs. Hold it to run several forwards in one state.
        seed: Seed of the random draws (question routing, step dropout).
        step: Optimizer step; draws change with it. A training loop of your own sets it before each forward.
        step_dropout: Probability of dropping each of the steps before the answer while training; empty means never.
    """

    def __init__(self) -> None:
        self.configs: dict[str, MoteConfig] = {}
        self.active: str | None = None
        self.gate: Tensor | None = None
        self.step_ids: Tensor | None = None
        self.lock = threading.RLock()
        self.seed = 0
        self.step = 0
        self.step_dropout: tuple[float, ...] = ()
        self._tables: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle starts between two forwards, with a lock of its own.
        return {**self.__dict__, "lock": None, "gate": None, "segments": None, "step_ids": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def add(self, adapter_name: str, config: MoteConfig) -> None:
        """Make an adapter known."""
        self.configs[adapter_name] = config
        self._tables[adapter_name] = gate_table(config)
        self.active = self.active or adapter_name

    def remove(self, adapter_name: str) -> None:
        """Forget an adapter."""
        del self.configs[adapter_name], self._tables[adapter_name]

    @property
    def config(self) -> MoteConfig:
        """Configuration of the active adapter."""
        return self.configs[cast(str, self.active)]

    @property
    def vocabulary(self) -> StepVocabulary:
        """Steps and marker ids of the active adapter."""
        return self.config.vocabulary

    def turn(self) -> AbstractContextManager[object]:
        """Wait for the other threads' forwards; a traced forward cannot wait, and runs in one thread."""
        return nullcontext() if torch.compiler.is_compiling() else self.lock

    def set_gate(self, step_ids: Tensor) -> None:
        """Look up the gate of every token, (B, T) -> (B, T, R)."""
        name = cast(str, self.active)
        if self._tables[name].device != step_ids.device:
            self._tables[name] = self._tables[name].to(step_ids.device)
        self.gate = F.embedding(step_ids, self._tables[name])

    def gate_of(self, x: Tensor) -> Tensor:
        """Gate of the tokens that a layer runs on, (..., D) -> (..., R).

        Latent attention caches what its up-projection takes, so that layer runs on all tokens, the cached ones too.

        Args:
            x: The layer's input: the tokens of the forward, in one dimension or two, or all tokens of the cache, which
                may have room for more.

        Raises:
            RuntimeError: If the layer runs on anything else.
        """
        gate, tokens = self.gate, x.shape[:-1].numel()
        if gate is None:
            raise RuntimeError(
                "The tokens must be routed before a layer runs; got none. Call the model itself, not its decoder or "
                "its forward method."
            )
        if tokens == gate.shape[:-1].numel():
            return gate if x.dim() == 3 else gate.reshape(*x.shape[:-1], gate.shape[-1])
        rows = gate.shape[0]
        if self.step_ids is None or tokens % rows or tokens // rows < self.step_ids.shape[1]:
            raise RuntimeError(
                f"A layer with experts must run on the tokens of the forward; got an input of shape {tuple(x.shape)} "
                f"for {tuple(gate.shape[:-1])} tokens. Leave it out of lora_target_modules; with a cache that is "
                "continued by hand, call generate instead."
            )
        step_ids = F.pad(self.step_ids, (0, tokens // rows - self.step_ids.shape[1]))
        return F.embedding(step_ids, self._tables[cast(str, self.active)]).reshape(*x.shape[:-1], gate.shape[-1])

    def restore_before(self, output: Tensor) -> None:
        """Bring the current state back when the backward pass of an output begins, for layers that run again."""
        gate, segments, step_ids = self.gate, self.segments, self.step_ids

        def restore(_: Tensor) -> None:
            self.gate, self.segments, self.step_ids = gate, segments, step_ids

        output.register_hook(restore)  # type: ignore[no-untyped-call]


# What stands behind RoutedModel is a model; at runtime it comes from the class that is made, one per base class.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class RoutedModel(_Base):
    """What a base model's class gets in front of it: a forward and a ``generate`` that route.

    Besides the model's own arguments, its forward takes ``step_ids`` (B, T), the steps of the tokens that are fed. They
    are derived from ``input_ids`` when absent; only continuing a KV cache by hand, and ``inputs_embeds``, require them.
    ``generate`` supplies them itself. While the adapter is disabled the model is the base model, bit for bit.
    """

    forward_parameters: tuple[str, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A further model of this class, as from ``type(model).from_pretrained``, is a plain one without adapter."""
        if not args and not kwargs:  # as torch makes a replica, which gets the attributes of the original
            return object.__new__(cls)
        return _original_class(cls)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Route, then run the model's own forward."""
        kwargs = self.by_name(args) | kwargs
        if torch.compiler.is_compiling():  # one thread, nothing in between: no turn to take, no state to bring back
            with torch.no_grad():
                self._route(kwargs)
            return super().__call__(**kwargs)
        with self.routed(kwargs), self._wide_loss(kwargs.get("labels")):
            output = super().__call__(**kwargs)
            self.keep_routing(output)
            cache = find_cache(output if isinstance(output, Mapping) else kwargs)
            if hasattr(cache, "__dict__"):
                cache.mote_adapter = self.mote_routing.active
        return output

    def by_name(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """Positional arguments of the model's forward by their names: routing reads and replaces some of them."""
        return dict(zip(self.forward_parameters, args, strict=False))

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie the tables inside the layers of the markers; transformers would tie those layers themselves."""
        head = self.get_output_embeddings()
        if not isinstance(head, MarkerHead):
            super().tie_weights(*args, **kwargs)
        elif head.is_tied:
            head.base_layer.weight = self.get_input_embeddings().base_layer.weight

    @contextmanager
    def routed(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Hold the routing state of one forward; takes ``step_ids`` out of ``kwargs`` and sets positions and mask.

        Raises:
            ValueError: If the steps of the tokens cannot be known.
        """
        routing: Routing = self.mote_routing
        with routing.turn():
            before, active = (routing.gate, routing.segments, routing.step_ids), routing.active
            try:
                with torch.no_grad():
                    self._route(kwargs)
                yield
            finally:
                routing.active = routing.active or active  # a forward of the base alone forgets none
                if not torch.is_grad_enabled():  # nothing of this forward will run again
                    routing.gate, routing.segments, routing.step_ids = before

    def keep_routing(self, output: Any) -> None:
        """Call inside ``routed`` with the output: its state comes back when a backward pass from it begins."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    self.mote_routing.restore_before(tensor)

    def _wide_loss(self, labels: Any) -> AbstractContextManager[object]:
        """The model's own loss also reads the width of the logits off ``config.vocab_size``."""
        name = None if labels is None else _active_adapter(self)
        if name is None:
            return nullcontext()
        return _wide_vocabulary(self.config, max(self.mote_routing.configs[name].marker_ids) + 1)

    def _route(self, kwargs: dict[str, Any]) -> None:
        """Set the gate, and under step dropout the positions and the mask."""
        routing: Routing = self.mote_routing
        step_ids = kwargs.pop("step_ids", None)
        routing.active = _active_adapter(self)
        routing.segments = None
        cache = find_cache(kwargs)
        routing.step_ids = getattr(cache, "mote_step_ids", None)
        if routing.step_ids is not None and not torch.compiler.is_compiling():
            cache.mote_step_ids = None  # of this forward; whoever continues the cache by hand has other tokens
        if routing.active is None:
            routing.gate = None
            return
        if not torch.compiler.is_compiling():
            _check_filler(cache, routing.active)
        input_ids = kwargs.get("input_ids")
        if step_ids is None:
            if input_ids is None:
                raise ValueError(
                    "input_ids must be given: the tokens are the router; got none. Pass input_ids or step_ids."
                )
            if cache is not None and cached_length(cache) != 0:
                raise ValueError(
                    "step_ids must be given when input_ids continue a cache; got tokens without their history. "
                    "Pass step_ids_from_tokens(all_ids, config)[:, -n:] or use generate()."
                )
            step_ids = step_ids_from_tokens(input_ids, routing.vocabulary, kwargs.get("position_ids"))
        if self.training:
            # Without tokens (inputs_embeds) a document's steps take their place in its random draws.
            self._route_training(step_ids if input_ids is None else input_ids, step_ids, kwargs)
        else:
            routing.set_gate(step_ids)

    def _route_training(self, tokens: Tensor, step_ids: Tensor, kwargs: dict[str, Any]) -> None:
        routing: Routing = self.mote_routing
        config = routing.config
        mask = kwargs.get("attention_mask")
        valid = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        documents = document_starts(tokens, kwargs.get("position_ids"))
        draws = document_draws(
            tokens, documents, valid, seed=routing.seed, step=routing.step, num_draws=config.num_steps
        )
        routed = step_ids
        if config.question_routing == "random":
            routed = torch.where(step_ids == 0, draw_question_step(draws[0], config.num_steps), step_ids)
        routing.set_gate(routed)
        if any(routing.step_dropout):
            dropped = dropped_tokens(step_ids, draws[1 : 1 + len(routing.step_dropout)], routing.step_dropout)
            positions = positions_without_dropped(step_ids, dropped, documents, config.num_steps, valid)
            valid = torch.ones_like(dropped) if valid is None else valid
            visibility = Visibility(documents, step_ids, dropped, positions, valid)
            kwargs["position_ids"] = positions
            mask = build_attention_mask(visibility, self.config, self.dtype)
            if isinstance(mask, Segments):
                routing.segments, mask = mask, None
            kwargs["attention_mask"] = mask

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Add the steps of the tokens that a forward of ``generate`` is fed.

        A forward that continues a KV cache gets the new tokens alone; this is the one place that sees all of them.

        Raises:
            ValueError: If the tokens before the new ones are missing.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        name = _active_adapter(self)
        if name is None:
            return inputs
        if inputs.get("input_ids") is None:
            raise ValueError("input_ids must be given: the tokens are the router; got none. Pass input_ids.")
        fed, cache = inputs["input_ids"].shape[1], find_cache(inputs)
        if cache is not None:
            _check_whole(input_ids.shape[1], fed, cache, bool(kwargs.get("is_first_iteration")))
        vocabulary = self.mote_routing.configs[name].vocabulary
        step_ids = step_ids_from_tokens(input_ids, vocabulary)
        inputs["step_ids"] = step_ids[:, -fed:]
        if cache is not None:
            cache.mote_step_ids = step_ids  # for layers that run on cached tokens again; see ``gate_of``
        return inputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` with a vocabulary that holds the markers, also where the base model's table ends before them.

        Beam search and prompt lookup read the width of the logits off ``config.vocab_size``. The configuration itself
        must keep the base model's size, or PEFT would take the table for resized and save it.

        Raises:
            ValueError: If an assistant model does not know the markers.
        """
        name = _active_adapter(self)
        if name is None:
            return super().generate(*args, **kwargs)
        width = max(self.mote_routing.configs[name].marker_ids) + 1
        assistant = kwargs.get("assistant_model")
        if assistant is not None:
            table = assistant.get_input_embeddings()
            if not isinstance(table, MarkerEmbedding) and table.weight.shape[0] < width:
                raise ValueError(
                    f"assistant_model must have embeddings for the markers, up to id {width - 1}; its table has "
                    f"{table.weight.shape[0]} rows. Use a model with a MoTE adapter or an exported one."
                )
        helper = nullcontext() if assistant is None else _wide_vocabulary(assistant.config, width)
        with _wide_vocabulary(self.config, width), helper:
            return super().generate(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class exists only in this process; a pickle names the one it was made from.
        state = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))[2]
        state = {**state, "true_vocab_size": _true_vocabulary(self.config)}
        return _new_routed, (_original_class(type(self)),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        size = state.pop("true_vocab_size")
        super().__setstate__(state)
        config = self.config.get_text_config()
        with _WIDE_LOCK:
            if id(config) not in _WIDE:  # a copy, made while another thread generated
                config.vocab_size = size


def _check_whole(length: int, fed: int, cache: Any, is_first: bool) -> None:
    """Check that ``length`` tokens are those in a cache and the ``fed`` ones that continue it."""
    cached = cached_length(cache)
    if cached is None:
        return
    # A static cache counts on the device. Only where tokens could be missing is it worth waiting for that.
    if (isinstance(cached, int) or fed > 1 or is_first) and int(cached) + fed != length:
        raise ValueError(
            "input_ids must hold the whole sequence, not only what continues a cache, because the tokens are the "
            f"router; got {length} tokens for {int(cached)} in the cache and {fed} to feed. Pass all of them, and no "
            "prefill_chunk_size."
        )


def _check_filler(cache: Any, adapter: str) -> None:
    """Check that what a cache holds was computed with the adapter that continues it."""
    filler = getattr(cache, "mote_adapter", adapter)
    if filler != adapter and cached_length(cache) != 0:  # emptied caches may go to another one
        found = "the base model alone" if filler is None else f"adapter {filler!r}"
        raise ValueError(
            f"a cache must be continued with the adapter that filled it; got one that {found} filled, for adapter "
            f"{adapter!r}. Start with a new cache."
        )


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor of a model's output, hidden states of all layers included."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _active_adapter(model: RoutedModel) -> str | None:
    """Name of the active adapter; None while this thread has adapters disabled, or none is active."""
    with model.mote_routing.turn():  # another thread may have disabled them, for its turn alone
        embedding: MarkerEmbedding = model.get_input_embeddings()
        return embedding.enabled_adapter


def start_routing(model: PreTrainedModel, routing: Routing) -> None:
    """Make a model route its forwards; calling it again changes nothing."""
    if not isinstance(model, RoutedModel):
        model.__class__ = _routed_class(cast(Any, type(model)))
        model.mote_routing = routing
        attach(model, routing)


def stop_routing(model: PreTrainedModel) -> None:
    """Give a model its own class back."""
    if isinstance(model, RoutedModel):
        model.__class__ = _original_class(type(model))
        del model.mote_routing
        detach(model)


@functools.cache
def _routed_class(cls: Any) -> Any:
    # Under the name of the original, which configurations and messages are written from.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    names["forward_parameters"] = tuple(inspect.signature(cls.forward).parameters)[1:]
    return type(cls.__name__, (RoutedModel, cls), names)


def _original_class(routed: type) -> type:
    """The class that a routed class, or a class that something else derived from it, was made from."""
    return routed.__mro__[routed.__mro__.index(RoutedModel) + 1]


def _new_routed(cls: Any) -> Any:
    return object.__new__(_routed_class(cls))


_WIDE: dict[int, tuple[int, int]] = {}  # id of a configuration -> generations in progress, the size to go back to
_WIDE_LOCK = threading.Lock()


def _true_vocabulary(config: PretrainedConfig) -> int:
    """The ``vocab_size`` that a configuration has outside of ``_wide_vocabulary``."""
    config = config.get_text_config()
    with _WIDE_LOCK:
        return _WIDE[id(config)][1] if id(config) in _WIDE else int(config.vocab_size)


@contextmanager
def _wide_vocabulary(config: PretrainedConfig, width: int) -> Iterator[None]:
    """Raise ``vocab_size`` to a width until the last of several generations, in any thread, has ended."""
    config = config.get_text_config()
    with _WIDE_LOCK:
        users, size = _WIDE.get(id(config), (0, config.vocab_size))
        _WIDE[id(config)] = (users + 1, size)
        config.vocab_size = max(config.vocab_size, width)
    try:
        yield
    finally:
        with _WIDE_LOCK:
            users, size = _WIDE.pop(id(config))
            if users > 1:
                _WIDE[id(config)] = (users - 1, size)
            else:
                config.vocab_size = size
