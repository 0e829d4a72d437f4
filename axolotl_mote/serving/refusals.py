"""What is refused when an adapter is loaded or a request comes in, since it would be answered wrongly."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import ADAPTIVE
from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.export.served import check_can_be_gated, served_rank
from axolotl_mote.generation.folder import WEIGHTS, check_fits, read_mote_config, read_shapes
from axolotl_mote.generation.loading import load_tokenizer
from axolotl_mote.serving.chains import CONTRADICTING, CONTRADICTION, STEPS, check_request, requested_steps
from axolotl_mote.serving.command import FORMATS, IN_REASONING, PARSER, PROCESSOR
from axolotl_mote.serving.routes import MAX_STEPS, Route

MARKER_ROWS = "lora_marker_rows"
"""Part of the names of an adapter's marker rows; the served base has them in its tables."""


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
        "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "--enable-sleep-mode": model.enable_sleep_mode,
        "--runner pooling": model.runner_type == "pooling",
        f"--tokenizer-mode {model.tokenizer_mode}": model.tokenizer_mode not in ("auto", "hf", "slow"),
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
    way_out = "Serve the base that `axolotl-mote export --format vllm` wrote for this adapter."
    with safe_open(os.path.join(folder, WEIGHTS), framework="pt") as file:
        rows = {name: file.get_tensor(name) for name in file.keys() if MARKER_ROWS in name}  # noqa: SIM118
    if not rows:
        raise ValueError(f"adapter must hold its marker rows, {MARKER_ROWS}; got none in {folder}. {way_out}")
    tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    for name, row in rows.items():
        is_head = "embed" not in name
        found = [t.weight for t in tables if isinstance(t, ParallelLMHead) == is_head and hasattr(t, "weight")]
        held = [table[ids].float().cpu() for table in found if len(table) > max(ids) and table.shape[1] == row.shape[1]]
        # Another type on disk rounds them, bfloat16 by 2^-8 of a value.
        if not any(torch.allclose(table, row.float(), rtol=2**-7, atol=1e-6) for table in held):
            raise ValueError(
                f"the served base must have the adapter's marker rows, ids {ids}; it has others. {way_out}"
            )


def check_adapter(folder: str, base: str, model_config: Any) -> None:
    """Check that an adapter's files are whole, and made for the served base and its markers.

    Raises:
        ValueError: If not.
    """
    place = Path(folder)
    config = read_mote_config(place)
    shapes = read_shapes(place, config)
    load_tokenizer(place, base, config)
    with torch.device("meta"):  # no weights: names and sizes of layers
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    check_fits(model, base, shapes, config, place)


def check_layers(loras: Iterable[str], gated: Iterable[str], packed: Mapping[str, Iterable[str]], is_mla: bool) -> None:
    """Check that the engine applies every layer of an adapter, and gates it.

    Args:
        loras: Names of the adapter's layers.
        gated: Names of the engine's layers with LoRA, of the language model.
        packed: Name of a layer of the engine -> the layers that it was made of.
        is_mla: Whether latent attention is computed without calling its layers.

    Raises:
        ValueError: If a layer would be left out.
    """
    names = list(loras)
    check_can_be_gated(names)
    known = set(gated)
    known |= {part for name in known for part in packed.get(name, ())}
    if is_mla:
        known = {name for name in known if not name.endswith("kv_b_proj")}
    if lost := sorted(set(names) - known):
        raise ValueError(
            f"vLLM must apply every layer of the adapter; it leaves out {lost[0]}"
            f"{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}. Leave --lora-target-modules out, or use "
            "`axolotl-mote generate`."
        )


def _vocabulary_of(folder: str) -> StepVocabulary | None:
    """The steps of a MoTE adapter; read each time, since an adapter may be replaced in its folder."""
    route = Route.from_folder(folder) if os.path.isdir(folder) else None
    return route.vocabulary if route else None


def check_format(params: Any, formats: Any) -> None:
    """Check that a format that a request asks for is kept: vLLM leaves it alone until the reasoning ends, here never.

    Args:
        params: vLLM's ``SamplingParams``.
        formats: The server's ``StructuredOutputsConfig``.

    Raises:
        ValueError: If the server would not keep it.
    """
    if params.structured_outputs and formats.reasoning_parser == PARSER and not formats.enable_in_reasoning:
        raise ValueError(
            f"a format must be asked of a server with {FORMATS}.{IN_REASONING} true; this one would ignore it. "
            "Start it with `axolotl-mote serve`."
        )


def check_sampling(
    params: Any, adapter: str | None, codec: ChainCodec | None, processors: Iterable[Any], stops: Iterable[int] = ()
) -> None:
    """Check a request with steps where its final parameters are known, whichever endpoint it came from.

    Args:
        params: vLLM's ``SamplingParams``.
        adapter: Folder of the LoRA that it names; None: the base.
        codec: That of the served base; None if it has no steps.
        processors: The engine's logits processors, by name or class.
        stops: The request's own ``stop_token_ids``.

    Raises:
        ValueError: If the grammar cannot be followed.
    """
    values = params.extra_args or {}
    if STEPS not in values:
        return
    if codec is None or PROCESSOR not in [str(one) for one in processors]:
        raise ValueError(
            "steps must be asked of a server with markers and a step grammar. Start it with `axolotl-mote serve`."
        )
    given = {name: getattr(params, name, None) for name in CONTRADICTING} | {
        "stop_token_ids": [token for token in stops if token != codec.stop_id]  # it ends every chain
    }
    for name, value in given.items():
        if value:
            raise ValueError(CONTRADICTION.format(name))
    check_request(values, codec.vocabulary, params.max_tokens)
    own = adapter and _vocabulary_of(adapter)
    if own and own.steps != codec.vocabulary.steps:
        names = requested_steps(values)
        if names == ADAPTIVE or not set(names) <= set(own.steps):
            raise ValueError(
                f"steps must list steps of this adapter, {list(own.steps)}; got {values[STEPS]!r}. Correct them."
            )


def refuse_groups(runner: Any, folder: str) -> None:
    """Refuse a MoTE adapter on the V1 runner where keys and values have several groups, in which blocks are shared.

    Raises:
        ValueError: If they have.
    """
    groups = len(runner.kv_cache_config.kv_cache_groups)
    if groups > 1 and _vocabulary_of(folder):
        raise ValueError(
            f"a MoTE adapter must be served with one KV cache group on the V1 runner; this model has {groups}. "
            "Set VLLM_USE_V2_MODEL_RUNNER=1, on a GPU."
        )
