"""The step-routed LoRA: gated layers and the PEFT tuner that routes them.

All experts of a layer are ONE LoRA of rank R = (S + 1) * r whose inner activation is multiplied by a per-token gate
(MoTE, section 3.2). The gate is computed once per forward of the whole model, from the tokens alone, and only read by
the layers; recomputation under gradient checkpointing reads the same gate. Every expert takes part in every forward, so
no parameter is ever unused. Nothing here knows of axolotl, data sets or losses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from axolotl_mote.attention import SegmentsHolder, attach, render
from axolotl_mote.config import PEFT_TYPE, MoteConfig
from axolotl_mote.loss import token_losses
from axolotl_mote.markers import MarkerEmbedding, MarkerHead, MarkerRows, refuse_merge
from axolotl_mote.masks import Segments, Visibility
from axolotl_mote.routing import (
    document_draws,
    document_starts,
    draw_question_step,
    gate_table,
    hidden_steps,
    step_ids_from_tokens,
    visible_positions,
)


class Routing(SegmentsHolder):
    """The routing state of one model: set once per forward, read by every layer.

    The state is that of the latest forward, so the backward pass of a forward with gradient checkpointing must come
    before the next forward, as it does in every training loop that we know.

    Attributes:
        gate: Weight of every rank for every token of the current forward, shape (B, T, R), float32.
        seed: Seed of the random draws (question routing, step dropout).
        step: Optimizer step; draws change with it. A training loop of your own sets it before each forward.
        step_dropout: Probability of hiding each of the steps but the last while training; empty means never.
    """

    def __init__(self, config: MoteConfig) -> None:
        self.config = config
        self.gate: Tensor | None = None
        self.seed = 0
        self.step = 0
        self.step_dropout: tuple[float, ...] = ()
        self._table = gate_table(config)

    def set_gate(self, step_ids: Tensor) -> None:
        """Look up the gate of every token, (B, T) -> (B, T, R)."""
        if self._table.device != step_ids.device:
            self._table = self._table.to(step_ids.device)
        self.gate = F.embedding(step_ids, self._table)


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
        self._active_adapter = adapter_name
        # PEFT derives the scaling as alpha / rank; over the total rank that is alpha * (S + 1) / R = alpha / r.
        LoraLayer.update_layer(
            self, adapter_name, config.total_rank, lora_alpha=config.lora_alpha * (config.num_steps + 1), config=config
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer plus gated LoRA, shape (B, T, D) -> (B, T, D_out), in the dtype of the base layer's output."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        adapter = self.active_adapters[0]
        gate = cast(Tensor, self.routing.gate)
        if x.dim() != 3:  # a model that flattens its tokens before a layer: (B * T, D)
            gate = gate.reshape(*x.shape[:-1], gate.shape[-1])
        lora_a, lora_b = self.lora_A[adapter], self.lora_B[adapter]
        x = LoraLayer._cast_input_dtype(self, x, lora_a.weight.dtype)
        inner = lora_a(self.lora_dropout[adapter](x))
        return result + lora_b(inner * gate.to(inner.dtype)).to(result.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A gated LoRA is not one LoRA; ``axolotl mote export`` writes one per step."""
        return False


class MoteModel(LoraModel):
    """The PEFT tuner of type MOTE: routes once per forward, then runs the wrapped model.

    Besides the model's own arguments, its forward takes ``step_ids`` (B, T), the steps of the tokens that are fed; they
    are derived from ``input_ids`` when absent and are needed only to continue a KV cache by hand. ``generate`` supplies
    them on its own.
    """

    model: PreTrainedModel
    routing: Routing
    chunked_loss = True
    """Off under DeepSpeed ZeRO-3: it gathers the head for every call, so all ranks must call equally often, whatever
    the length of their rows, and it does not gather the head when a chunk is computed again."""

    def _pre_injection_hook(self, model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
        if not isinstance(config, MoteConfig) or not config.marker_ids:
            raise ValueError(
                "marker_ids must be set before a MoTE adapter is added; got none. "
                "Add the marker tokens to the tokenizer and pass their ids to MoteConfig."
            )
        self.routing = Routing(config)

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        if len(self.peft_config) > 1:
            raise NotImplementedError(
                f"A model carries one MoTE adapter; got {sorted(self.peft_config)}. Load the second on another model."
            )
        super()._check_new_adapter_config(config)

    def _create_new_module(
        self, lora_config: MoteConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not hasattr(base, "in_features") or not hasattr(base, "out_features"):
            raise TypeError(
                f"lora_target_modules must name linear layers with adapter: mote; got {type(base).__name__}. "
                "Set lora_target_linear: true."
            )
        return MoteLinear(target, adapter_name, lora_config, self.routing)

    def _post_injection_hook(self, model: PreTrainedModel, config: MoteConfig, adapter_name: str) -> None:
        self._wrap_embeddings(model, config, adapter_name)
        self._vocab_size = model.config.get_text_config().vocab_size
        attach(model, self.routing)
        # Hooks and not an override of forward: generate calls the wrapped model directly.
        model.register_forward_pre_hook(self._route, with_kwargs=True)
        model.prepare_inputs_for_generation = self._with_step_ids(model.prepare_inputs_for_generation)
        model.generate = _with_wide_vocabulary(model, config.marker_ids)

    def _wrap_embeddings(self, model: PreTrainedModel, config: MoteConfig, adapter_name: str) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head.weight is embedding.weight

        def new_rows(layer: nn.Module) -> MarkerRows:
            weight = cast(Tensor, layer.weight)
            width = layer.embedding_dim if isinstance(layer, nn.Embedding) else layer.in_features
            rows = MarkerRows(torch.zeros(2 * config.num_steps, cast(int, width), device=weight.device))
            return rows.requires_grad_(not config.inference_mode)

        rows = new_rows(embedding)
        head_rows = rows if tied else new_rows(head)
        model.set_input_embeddings(MarkerEmbedding(embedding, config.marker_ids, rows, adapter_name))
        model.set_output_embeddings(MarkerHead(head, config.marker_ids, head_rows, adapter_name, tied))

    def forward(self, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the wrapped model; through ``__call__``, so that the routing hook sees this forward too.

        Args:
            *args: The model's own.
            targets: Shifted labels, shape (B, T). With them no logits are returned: the output's ``loss`` holds the
                negative log-likelihood of every target, shape (B, T), computed in chunks of tokens.
            **kwargs: The model's own, and ``step_ids``.
        """
        # PEFT's own forward passes labels along, None or not.
        if targets is None:
            return self.model(*args, **kwargs)
        self._route(self.model, args, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        hidden = self.model.get_decoder()(*args, **kwargs, use_cache=False).last_hidden_state
        losses = token_losses(hidden, targets, self._logits, self._vocab_size, self.chunked_loss)
        return CausalLMOutputWithPast(loss=losses)

    def _logits(self, hidden: Tensor) -> Tensor:
        """The head and what a model does to its output: (N, D) -> (N, V)."""
        config = self.model.config.get_text_config()
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * factor
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        return logits

    @torch.no_grad()
    def _route(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward pre-hook of the wrapped model: set the gate, and while a step is hidden the positions and mask."""
        step_ids = kwargs.pop("step_ids", None)
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        training = model.training
        if step_ids is None:
            if input_ids is None:
                raise ValueError(
                    "input_ids must be given: the tokens are the router; got none. Pass input_ids or step_ids."
                )
            cache = kwargs.get("past_key_values")
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    "step_ids must be given when input_ids continue a cache; got tokens without their history. "
                    "Pass step_ids_from_tokens(all_ids, config)[:, -n:] or use generate()."
                )
            step_ids = step_ids_from_tokens(input_ids, self.routing.config, kwargs.get("position_ids"))
        self.routing.segments = None
        if not training:
            self.routing.set_gate(step_ids)
            return args, kwargs
        self._route_training(model, cast(Tensor, input_ids), step_ids, kwargs)
        return args, kwargs

    def _route_training(
        self, model: PreTrainedModel, input_ids: Tensor, step_ids: Tensor, kwargs: dict[str, Any]
    ) -> None:
        routing, config = self.routing, self.routing.config
        mask = kwargs.get("attention_mask")
        valid = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        documents = document_starts(input_ids, kwargs.get("position_ids"))
        draws = document_draws(
            input_ids, documents, valid, seed=routing.seed, step=routing.step, num_draws=config.num_steps
        )
        routed = step_ids
        if config.question_routing == "random":
            routed = torch.where(step_ids == 0, draw_question_step(draws[0], config.num_steps), step_ids)
        routing.set_gate(routed)
        if any(routing.step_dropout):
            hideable = draws[1 : 1 + len(routing.step_dropout)]
            hidden = hidden_steps(step_ids, hideable, routing.step_dropout)
            positions = visible_positions(step_ids, hidden, documents, config.num_steps, valid)
            valid = torch.ones_like(hidden) if valid is None else valid
            visibility = Visibility(documents, step_ids, hidden, positions, valid)
            kwargs["position_ids"] = positions
            mask = render(visibility, model.config, model.dtype)
            if isinstance(mask, Segments):
                routing.segments, mask = mask, None
            kwargs["attention_mask"] = mask

    def _with_step_ids(self, prepare: Any) -> Any:
        """Wrap ``prepare_inputs_for_generation``: it alone sees all tokens when a cache holds most of them."""

        @functools.wraps(prepare)
        def prepare_inputs_for_generation(input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
            mask = kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != input_ids.shape[1]:
                raise ValueError(
                    f"input_ids must hold the whole sequence, not only what continues a cache, because the tokens are "
                    f"the router; got {input_ids.shape[1]} of {mask.shape[1]} tokens. Pass all of them, and no "
                    "prefill_chunk_size."
                )
            inputs: dict[str, Any] = prepare(input_ids, *args, **kwargs)
            if inputs.get("input_ids") is None:
                raise ValueError("input_ids must be given: the tokens are the router; got none. Pass input_ids.")
            fed = inputs["input_ids"].shape[1]
            inputs["step_ids"] = step_ids_from_tokens(input_ids, self.routing.config)[:, -fed:]
            return inputs

        return prepare_inputs_for_generation

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()


def _with_wide_vocabulary(model: PreTrainedModel, marker_ids: list[int]) -> Any:
    """Wrap ``generate``: beam search and prompt lookup read the width of the logits off the configuration.

    The configuration itself must keep the base model's size, or PEFT would take the table for resized and save it.
    """
    generate = model.generate
    width = max(marker_ids) + 1

    @functools.wraps(generate)
    def generate_wide(*args: Any, **kwargs: Any) -> Any:
        assistant = kwargs.get("assistant_model")
        models = [model] if assistant is None else [model, assistant]
        if assistant is not None:
            table = assistant.get_input_embeddings()
            if not isinstance(table, MarkerEmbedding) and table.weight.shape[0] < width:
                raise ValueError(
                    f"assistant_model must have embeddings for the markers, up to id {width - 1}; its table has "
                    f"{table.weight.shape[0]} rows. Use a model with a MoTE adapter or an exported one."
                )
        configs = [one.config.get_text_config() for one in models]
        sizes = [config.vocab_size for config in configs]
        for config, size in zip(configs, sizes, strict=True):
            config.vocab_size = max(size, width)
        try:
            return generate(*args, **kwargs)
        finally:
            for config, size in zip(configs, sizes, strict=True):
                config.vocab_size = size

    return generate_wide


def add_mote_adapter(
    model: PreTrainedModel, config: MoteConfig, marker_words: list[list[int]] | None = None, **kwargs: Any
) -> PeftModel:
    """Add a fresh MoTE adapter to a model.

    Args:
        model: The base model.
        config: The adapter's configuration; its ``marker_ids`` must be set.
        marker_words: For each marker, token ids of words that describe it; its rows start as the mean of theirs.
            Without it they start as the mean of the whole table.
        **kwargs: Passed to ``peft.get_peft_model``.

    Returns:
        The PeftModel, ready for training.
    """
    peft_model = cast(PeftModel, get_peft_model(model, config, **kwargs))
    words_by_row = marker_words or [[]] * len(config.marker_ids)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for rows in layer.lora_marker_rows.values():
            table = layer.base_layer.weight
            with _gathered(table), torch.no_grad():
                for row, words in enumerate(words_by_row):
                    rows.weight[row] = (table[words] if words else table).float().mean(0)
    return peft_model


@contextmanager
def _gathered(parameter: Tensor) -> Iterator[None]:
    """Make a parameter that DeepSpeed ZeRO-3 has partitioned readable; does nothing to any other."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter):
        yield


def mote_model(model: nn.Module) -> MoteModel | None:
    """The MoTE tuner inside a (wrapped) model, or None if there is none."""
    for module in model.modules():
        if isinstance(module, MoteModel):
            return module
    return None


def _register() -> None:
    peft_type = PeftType(PEFT_TYPE)
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = MoteModel
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING.pop(peft_type, None)
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = MoteModel.prefix


_register()
