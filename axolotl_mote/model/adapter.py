"""The step-routed LoRA: gated layers and the PEFT tuner that routes them.

All experts of a layer are ONE LoRA of rank R = (S + 1) * r whose inner activation is multiplied by a per-token gate
(MoTE, section 3.2). The gate is computed once per forward of the whole model, from the tokens alone, and only read by
the layers; recomputation under gradient checkpointing reads the same gate. Every expert takes part in every forward, so
no parameter is ever unused. No axolotl, no data sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn, cast

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from axolotl_mote.model.compat import (
    cast_input,
    init_tuner_layer,
    move_adapter,
    register_peft_type,
    save_adapter_alone,
    text_decoder,
)
from axolotl_mote.model.config import PEFT_TYPE, MoteConfig
from axolotl_mote.model.head import logits_path
from axolotl_mote.model.loss import token_losses
from axolotl_mote.model.markers import (
    Gathered,
    MarkerEmbedding,
    MarkerHead,
    MarkerRows,
    PerLayerEmbedding,
    refuse_merge,
)
from axolotl_mote.model.origin import check_origin, sample_weights
from axolotl_mote.model.routed import RoutedModel, Routing, start_routing, stop_routing
from axolotl_mote.model.targets import choose_targets, warn_of_fused_weights

PER_LAYER = "embed_tokens_per_layer"
"""Name of the second embedding that Gemma 3n and Gemma 4 look their tokens up in."""


class MoteLinear(nn.Module, LoraLayer):
    """A linear layer with all experts as one gated LoRA.

        y = W x + B((A x) * gate[step_ids])        (MoTE, section 3.2)

    The scaling is part of the gate. The base layer may be any linear layer, quantized ones included.
    """

    # PEFT's base class is untyped.
    base_layer: nn.Module
    lora_A: nn.ModuleDict  # noqa: N815
    lora_B: nn.ModuleDict  # noqa: N815
    lora_dropout: nn.ModuleDict
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoteConfig, routing: Routing) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.routing = routing
        init_tuner_layer(self, adapter_name)
        self.update_layer(adapter_name, config.r, config.lora_alpha, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: MoteConfig, **_: Any) -> None:
        """Add an adapter: one LoRA that holds all of its experts."""
        # PEFT derives the scaling as alpha / rank; over the total rank that is alpha * (S + 1) / R = alpha / r.
        experts = config.num_steps + 1
        LoraLayer.update_layer(self, adapter_name, experts * r, lora_alpha=lora_alpha * experts, config=config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer plus gated LoRA, shape (B, T, D) -> (B, T, D_out), in the dtype of the base layer's output."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        names = self.active_adapters
        if self.disable_adapters or not names or names[0] not in self.lora_A:
            return result
        adapter = names[0]
        gate = self.routing.gate_of(x)
        lora_a, lora_b = self.lora_A[adapter], self.lora_B[adapter]
        x = cast_input(self, x, cast(Tensor, lora_a.weight).dtype)
        inner = lora_a(self.lora_dropout[adapter](x))
        update: Tensor = lora_b(inner * gate.to(inner))
        return result + update.to(result.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        move_adapter(self, adapter_name, device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A gated LoRA is not one LoRA; ``axolotl mote export`` writes one per step."""
        return False


class MoteModel(LoraModel):
    """The PEFT tuner of type MOTE: puts the experts and the marker rows into a model and makes it route.

    A model carries any number of MoTE adapters, of which one is active. Besides the model's own arguments, its forward
    takes ``step_ids``; see ``RoutedModel``.
    """

    model: PreTrainedModel
    routing: Routing
    tuner_layer_cls = BaseTunerLayer
    """The marker rows are switched and deleted as the LoRA layers are."""
    gathered: Gathered | None = None
    """Must be set under DeepSpeed ZeRO-3 (``training.compat.gathered``): the head is then gathered once per forward,
    on all ranks alike, however many chunks their rows make."""

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, low_cpu_mem_usage: bool = False, **kwargs: Any
    ) -> None:
        """Add an adapter to the model; PEFT calls this for the first one and for all later ones.

        Raises:
            ValueError: If the configuration is of another type or names no markers, if the adapter was trained on
                other weights, or if the base model has another use for a marker, no text decoder, or no layer that can
                have experts.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, MoteConfig) or not config.marker_ids:
            raise ValueError(
                "marker_ids must be set before a MoTE adapter is added; got none. "
                "Add the marker tokens to the tokenizer and pass their ids to MoteConfig."
            )
        if not hasattr(self, "routing"):
            self.routing = Routing()
            self.register_load_state_dict_pre_hook(_check_tensors)
        base = cast(PreTrainedModel, model)
        _refuse_used_markers(base, config)
        check_origin(base, config.base_sample, config.base_model_name_or_path, config.marker_ids)
        choose_targets(base, config)
        super().inject_adapter(model, adapter_name, *args, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
        self._add_marker_rows(base, config, adapter_name, low_cpu_mem_usage)
        self.routing.add(adapter_name, config)
        start_routing(base, self.routing)

    def _create_new_module(
        self, lora_config: MoteConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        largest = max(base.in_features, base.out_features)
        if lora_config.r > largest:
            raise ValueError(
                f"r must be at most {largest}, the larger side of a layer that it adapts; got {lora_config.r}. "
                "Use the value that training wrote, or a smaller one."
            )
        return MoteLinear(target, adapter_name, lora_config, self.routing)

    def _add_marker_rows(
        self, model: PreTrainedModel, config: MoteConfig, adapter_name: str, low_cpu_mem_usage: bool
    ) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(embedding, MarkerEmbedding):
            tied = head.weight is embedding.weight
            embedding = MarkerEmbedding(embedding, adapter_name)
            head = MarkerHead(head, adapter_name, embedding if tied else None)
            self._vocab_size = model.config.get_text_config().vocab_size
            model.set_input_embeddings(embedding)
            model.set_output_embeddings(head)
            decoder = text_decoder(model)
            if isinstance(per_layer := getattr(decoder, PER_LAYER, None), nn.Embedding):
                setattr(decoder, PER_LAYER, PerLayerEmbedding(per_layer, adapter_name))
        trainable = adapter_name in self.active_adapters and not config.inference_mode

        def new_rows(layer: MarkerEmbedding | MarkerHead) -> MarkerRows:
            base = cast(Any, layer).get_base_layer()
            width = base.embedding_dim if isinstance(base, nn.Embedding) else base.in_features
            device = torch.device("meta") if low_cpu_mem_usage else base.weight.device
            rows = MarkerRows(torch.zeros(2 * config.num_steps, width, device=device))
            return rows.requires_grad_(trainable)

        for layer in (embedding, cast(MarkerHead, head)):
            layer.add_rows(adapter_name, list(config.marker_ids), new_rows(layer))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one.

        Raises:
            NotImplementedError: For more than one: their experts belong to different steps.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise NotImplementedError(f"One MoTE adapter must be active at a time; got {names}. Name one of them.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with its marker rows."""
        super().delete_adapter(adapter_name)
        self.routing.remove(adapter_name)

    def unload(self) -> nn.Module:
        """Take every adapter out and return the base model as it was."""
        base = cast(nn.Module, super().unload())
        stop_routing(cast(PreTrainedModel, base))
        return base

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                f"adapter_names must not be given with MoTE adapters; got {kwargs['adapter_names']}. One adapter is "
                "active at a time: call set_adapter."
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def forward(self, *args: Any, targets: Tensor | None = None, scored: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the wrapped model.

        Args:
            *args: The model's own.
            targets: Shifted labels, shape (B, T). With them no logits are returned: the output's ``loss`` holds the
                negative log-likelihood of every target, shape (B, T), computed in chunks of tokens.
            scored: The tokens that have a target, from ``scored_positions``, shape (N,): the head runs on no others.
            **kwargs: The model's own, and ``step_ids``.
        """
        if targets is None:
            return self.model(*args, **kwargs)
        model = cast(RoutedModel, self.model)
        # PEFT passes every argument of its own, such as labels, also as None; decoders do not take them.
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        kwargs = model.by_name(args) | kwargs
        with model.routed(kwargs):
            decoder = text_decoder(self.model)
            hidden = decoder(**kwargs, use_cache=False).last_hidden_state
            model.keep_routing(hidden)
            base = cast(PreTrainedModel, self.model)
            head = None if self.gathered is None else base.get_output_embeddings().held(self.gathered)
            losses = token_losses(hidden, targets, logits_path(base, head, self.routing.turn), self._vocab_size, scored)
        return CausalLMOutputWithPast(loss=losses)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()


_PARTS = ("lora_A", "lora_B", "lora_marker_rows")


def _refuse_used_markers(model: PreTrainedModel, config: MoteConfig) -> None:
    for settings in (model.config.get_text_config(), model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(settings, name, None)
            for token in ids if isinstance(ids, list) else [ids]:
                if token in config.marker_ids:
                    marker = config.markers[config.marker_ids.index(token)]
                    raise ValueError(
                        f"marker_ids must be tokens that nothing else uses; got {token}, {marker}, which is also "
                        f"the base model's {name}. Rename the step."
                    )


def _check_tensors(module: MoteModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse the tensors of an adapter that are not exactly those of its configuration on this base model.

    PEFT loads what it finds and leaves the rest at random values.

    Raises:
        ValueError: If tensors are missing, unknown or of another shape.
    """
    state = {prefix + name: tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    own = {name: tensor for name, tensor in state.items() if _of_adapter(name)}
    given = {name: tensor for name, tensor in state_dict.items() if _of_adapter(name)}
    if not given and state_dict:  # the base model's weights alone
        return
    base = state_dict.keys() - given.keys()
    if base and base < state.keys() - own.keys():
        raise ValueError(
            f"an adapter must hold no tensors of its base model; got {len(base)} ({min(base)}). Use the file that "
            "training wrote."
        )
    # PEFT 0.21 leaves the adapter's name out of the tensors that it does not know.
    nameless = tuple(f".{part}.weight" for part in _PARTS)
    strays = {name for name in given if name.endswith(nameless)}
    for adapter, config in module.peft_config.items():
        expected = {name: tensor for name, tensor in own.items() if _of_adapter(name, f"{adapter}.")}
        got = {n: tuple(x.shape) for n, x in given.items() if n in strays or _of_adapter(n, f"{adapter}.")}
        if given and not got:  # another adapter is loaded
            continue
        missing, unknown = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
        other = sorted(name for name in expected.keys() & got.keys() if got[name] not in _shapes(expected[name]))
        if not (missing or unknown or other):
            continue
        faults = [
            f"{len(names)} of {len(expected)} {kind} ({names[0]}{detail})"
            for kind, names, detail in (
                ("missing", missing, ""),
                ("unknown", unknown, ""),
                ("of another shape", other, f": {got[other[0]]} for {_shapes(expected[other[0]])[0]}" if other else ""),
            )
            if names
        ]
        raise ValueError(
            f"adapter {adapter!r} must have exactly the tensors of its configuration on this base model; got "
            f"{', '.join(faults)}. It was trained on {config.base_model_name_or_path}, this is "
            f"{module.model.config.name_or_path or type(module.model).__name__}. Use the complete adapter folder, and "
            "its base."
        )


def _of_adapter(name: str, adapter: str = "") -> bool:
    """Whether a tensor belongs to an adapter: to that one, or to any."""
    return any(f".{part}.{adapter}" in name for part in _PARTS)


def _shapes(tensor: Tensor) -> list[tuple[int, ...]]:
    """Shape of a parameter, and the empty one that it has in ZeRO-3's own checkpoints, which keep values elsewhere."""
    return [tuple(getattr(tensor, "ds_shape", tensor.shape)), tuple(tensor.shape)]


def add_mote_adapter(
    model: PreTrainedModel,
    config: MoteConfig,
    marker_words: list[list[int]] | None = None,
    *,
    gathered: Gathered = nullcontext,
    **kwargs: Any,
) -> PeftModel:
    """Add a fresh MoTE adapter to a model.

    Args:
        model: The base model.
        config: The adapter's configuration; its ``marker_ids`` must be set.
        marker_words: For each marker, token ids of words that describe it; its rows start as the mean of theirs.
            Without it they start as the mean of the whole table.
        gathered: Context manager that makes a partitioned parameter readable; ``training.compat.gathered`` under
            DeepSpeed ZeRO-3.
        **kwargs: Passed to ``peft.get_peft_model``.

    Returns:
        The PeftModel, ready for training.

    Raises:
        ValueError: If DeepSpeed ZeRO-3 has partitioned a table and ``gathered`` does not gather it.
    """
    choose_targets(model, config, run=True)
    warn_of_fused_weights(model)
    config.base_sample = sample_weights(model, config.marker_ids, gathered)
    peft_model = cast(PeftModel, get_peft_model(model, config, **kwargs))
    words_by_row = marker_words or [[]] * len(config.marker_ids)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for rows in layer.lora_marker_rows.values():
            table = layer.base_layer.weight
            with gathered(table), torch.no_grad():
                if not table.numel():
                    raise ValueError(
                        "gathered must make the embedding table readable; got an empty partition. Under DeepSpeed "
                        "ZeRO-3 pass gathered=axolotl_mote.training.compat.gathered."
                    )
                for row, words in enumerate(words_by_row):
                    rows.weight[row] = (table[words] if words else table).float().mean(0)
    return peft_model


def mote_model(model: nn.Module) -> MoteModel | None:
    """The MoTE tuner inside a model, however it is wrapped; None if there is none."""
    for module in model.modules():
        if isinstance(module, MoteModel):
            return module
    return None


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """The base model inside the block, for this thread alone: forwards of other threads wait and keep their experts.

    Args:
        model: A model with or without an adapter of any type.
    """
    tuner = mote_model(model)
    disabled = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    with nullcontext() if tuner is None else tuner.routing.lock, disabled:
        yield


register_peft_type(PEFT_TYPE, MoteConfig, MoteModel)
save_adapter_alone(PEFT_TYPE)
