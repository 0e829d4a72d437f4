"""The step grammar as vLLM's logits processor: ``--logits-processors axolotl_mote.serving.logits:StepProcessor``.

The two runners have different interfaces and each takes only classes of its own; this one class answers both. A request
without steps is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.sample.logits_processor import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.serving.chains import LIMIT, LIMIT_ALONE, STEPS, StepTables


def steps_of(params: SamplingParams) -> Mapping[str, Any] | None:
    """What a request says about steps, in ``extra_args``; None if nothing."""
    values = {key: value for key, value in (params.extra_args or {}).items() if key in (STEPS, LIMIT)}
    return values if STEPS in values else None


class StepProcessor(ProcessorV1, ProcessorV2):
    """Admits only tokens that keep the chain of a request valid."""

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        from transformers import AutoTokenizer

        self._state: Any = None if len(rest) == 2 else rest[0]  # V1: device, is_pin_memory; V2: the request states
        device = rest[0] if self._state is None else self._state.device
        codec = ChainCodec.from_tokenizer(AutoTokenizer.from_pretrained(vllm_config.model_config.tokenizer))
        self._tables = StepTables(codec, vllm_config.scheduler_config.max_num_seqs, device)
        self._drafts: int = vllm_config.num_speculative_tokens
        self._outputs: dict[int, list[int]] = {}  # V1: generated tokens by place in the batch

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a limit without steps; names and limits are checked where the tokenizer is, in the parser."""
        extra = sampling_params.extra_args or {}
        if LIMIT in extra and STEPS not in extra:
            raise ValueError(LIMIT_ALONE)

    # --- V2 -----------------------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take a request into its slot."""
        return self._tables.put(req_idx, steps_of(sampling_params), sampling_params.max_tokens)

    def _apply_v2(self, logits: Tensor, ctx: Any) -> Tensor:
        active = [row for row, slot in enumerate(ctx.idx_mapping_np.tolist()) if slot in self._tables.active]
        if not active:
            return logits
        slots = ctx.expanded_idx_mapping.to(torch.int64)
        begin = self._state.prompt_len.gpu[slots].to(torch.int64)
        longest = int(ctx.seq_lens_upper_bound_np[active].max())  # on the host; at least what was generated
        lengths = (ctx.pos.to(torch.int64) + 1 - begin).clamp(max=longest)  # rows without steps may be longer
        history = self._state.all_token_ids.gpu
        place = begin[:, None] + torch.arange(longest, device=begin.device)
        tokens = history[slots[:, None], place.clamp(max=history.shape[1] - 1)].to(torch.int64)
        row = torch.arange(len(slots), device=slots.device)
        for back in range(self._drafts + 1):  # a draft is in no history, only in the row that is fed with it
            place, fed = lengths - 1 - back, ctx.input_ids[(row - back).clamp(min=0)].to(torch.int64)
            known = (place >= 0) & (ctx.expanded_local_pos >= back)
            index = place.clamp(min=0)[:, None]
            tokens = tokens.scatter(1, index, torch.where(known[:, None], fed[:, None], tokens.gather(1, index)))
        return self._tables.mask(logits, slots, tokens, lengths.clamp(min=0))

    # --- V1 -----------------------------------------------------------------------------------------------------------

    def is_argmax_invariant(self) -> bool:
        """It changes greedy decoding."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests through the batch: removed, added, moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._take(index, None)
        for index, params, _, output in batch_update.added:
            self._tables.put(index, steps_of(params), params.max_tokens)
            self._take(index, output if index in self._tables.active else None)
        for source, target, direction in batch_update.moved:
            outputs, spare = (self._outputs.get(source), self._outputs.get(target)), len(self._tables) - 1
            if direction == MoveDirectionality.SWAP:
                self._tables.move(target, spare)
                self._tables.move(source, target)
                self._tables.move(spare, source)
                self._keep(source, outputs[1])
            else:
                self._tables.move(source, target)
                self._take(source, None)
            self._keep(target, outputs[0])

    def _take(self, index: int, output: list[int] | None) -> None:
        if output is None:
            self._tables.put(index, None, None)
        self._keep(index, output)

    def _keep(self, index: int, output: list[int] | None) -> None:
        self._outputs.pop(index, None)
        if output is not None:
            self._outputs[index] = output

    def _apply_v1(self, logits: Tensor) -> Tensor:
        if not self._outputs:
            return logits
        rows = sorted(self._outputs)
        longest = max(len(self._outputs[row]) for row in rows)
        padded = [[*self._outputs[row], *[0] * (longest - len(self._outputs[row]))] for row in rows]
        tokens = torch.tensor(padded, dtype=torch.int64, device=logits.device).reshape(len(rows), longest)
        lengths = torch.tensor([len(self._outputs[row]) for row in rows], device=logits.device)
        index = torch.tensor(rows, device=logits.device)
        logits[index] = self._tables.mask(logits[index], index, tokens, lengths)
        return logits

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Set the logits of inadmissible tokens to minus infinity, (N, V)."""
        return self._apply_v1(logits) if ctx is None else self._apply_v2(logits, ctx)
