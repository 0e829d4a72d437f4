"""The step-routed LoRA: gated layers and the PEFT tuner that routes them.

All experts of a layer are ONE LoRA of rank R = (S + 1) * r whose inner activation is multiplied by a per-token gate
(MoTE, section 3.2). The gate is computed once per forward of the whole model, from the tokens alone, and only read by
the layers; recomputation under gradient checkpointing reads the same gate. Every expert takes part in every forward, so
no parameter is ever unused. No axolotl, no data sets.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from axolotl_mote.model.attention import SegmentsHolder, attach, build_attention_mask
from axolotl_mote.model.compat import (
    cast_input,
    init_tuner_layer,
    register_peft_type,
    supply_step_ids,
    widen_vocabulary_in_generate,
)
from axolotl_mote.model.config import PEFT_TYPE, MoteConfig
from axolotl_mote.model.loss import token_losses
from axolotl_mote.model.markers import MarkerEmbedding, MarkerHead, MarkerRows, refuse_merge
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
    """The routing state of one model: set once per forward, read by every layer.

    The state is that of the latest forward. With gradient checkpointing, the backward pass of a forward must therefore
    come before the next forward, as in every usual training loop.

    Attributes:
        gate: Weight of every rank for every token of the current forward, shape (B, T, R), float32.
        seed: Seed of the random draws (question routing, step dropout).
        step: Optimizer step; draws change with it. A training loop of your own sets it before each forward.
        step_dropout: Probability of dropping each of the steps before the answer while training; empty means never.
    """

    def __init__(self, config: MoteConfig) -> None:
        self.config = config
        self.vocabulary = config.vocabulary
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
        init_tuner_layer(self, adapter_name)
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
        x = cast_input(self, x, cast(Tensor, lora_a.weight).dtype)
        inner = lora_a(self.lora_dropout[adapter](x))
        update: Tensor = lora_b(inner * gate.to(inner.dtype))
        return result + update.to(result.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A gated LoRA is not one LoRA; ``axolotl mote export`` writes one per step."""
        return False


class MoteModel(LoraModel):
    """The PEFT tuner of type MOTE: routes once per forward, then runs the wrapped model.

    Besides the model's own arguments, its forward takes ``step_ids`` (B, T), the steps of the tokens that are fed. They
    are derived from ``input_ids`` when absent; only continuing a KV cache by hand requires them. ``generate`` supplies
    them itself.
    """

    model: PreTrainedModel
    routing: Routing
    chunked_loss = True
    """Must be off under DeepSpeed ZeRO-3. ZeRO-3 gathers the head for every call, so all ranks must call it equally
    often, whatever the length of their rows; and it does not gather the head when a chunk is computed again."""

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
        supply_step_ids(model, lambda input_ids: step_ids_from_tokens(input_ids, self.routing.vocabulary))
        widen_vocabulary_in_generate(
            model, max(config.marker_ids) + 1, lambda embedding: isinstance(embedding, MarkerEmbedding)
        )

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
        """Run the wrapped model through its ``__call__``, so that the routing hook runs.

        Args:
            *args: The model's own.
            targets: Shifted labels, shape (B, T). With them no logits are returned: the output's ``loss`` holds the
                negative log-likelihood of every target, shape (B, T), computed in chunks of tokens.
            **kwargs: The model's own, and ``step_ids``.
        """
        if targets is None:
            return self.model(*args, **kwargs)
        self._route(self.model, args, kwargs)
        # PEFT passes every argument of its own, such as labels, also as None; decoders do not take them.
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
        """Forward pre-hook of the wrapped model: set the gate, and under step dropout the positions and the mask."""
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
            step_ids = step_ids_from_tokens(input_ids, self.routing.vocabulary, kwargs.get("position_ids"))
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
            dropped = dropped_tokens(step_ids, draws[1 : 1 + len(routing.step_dropout)], routing.step_dropout)
            positions = positions_without_dropped(step_ids, dropped, documents, config.num_steps, valid)
            valid = torch.ones_like(dropped) if valid is None else valid
            visibility = Visibility(documents, step_ids, dropped, positions, valid)
            kwargs["position_ids"] = positions
            mask = build_attention_mask(visibility, model.config, model.dtype)
            if isinstance(mask, Segments):
                routing.segments, mask = mask, None
            kwargs["attention_mask"] = mask

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Step-routed experts have no single merged weight."""
        refuse_merge()


def add_mote_adapter(
    model: PreTrainedModel,
    config: MoteConfig,
    marker_words: list[list[int]] | None = None,
    *,
    gathered: Callable[[Tensor], AbstractContextManager[object]] = nullcontext,
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


register_peft_type(PEFT_TYPE, MoteConfig, MoteModel)
