"""The reasoning parser that vLLM calls: ``--reasoning-parser mote``.

`content` is the answer, `reasoning` the steps before it. It follows every generation to its end, so vLLM is never told
that the reasoning is over; a stop that falls inside a step leaves `content` empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParser

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.serving.chains import CONTRADICTING_REQUEST, CONTRADICTION, LIMIT, LIMIT_ALONE, STEPS, check_request
from axolotl_mote.serving.reasoning import ChainSplitter, split_chain


@cache
def codec_at(folder: str) -> ChainCodec:
    """The codec of the tokenizer in a folder, one of our own: the server's is shared between threads."""
    from transformers import AutoTokenizer

    return ChainCodec.from_tokenizer(AutoTokenizer.from_pretrained(folder))


class MoteReasoningParser(ReasoningParser):
    """Splits what a model with steps generates."""

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._codec = codec_at(str(tokenizer.name_or_path))
        self._follow = self._splitter()
        self.mote_token_ids: Sequence[int] = ()  # of a complete output; the hook on DelegatingParser.parse sets them

    def _splitter(self) -> ChainSplitter:
        decode = self._codec.tokenizer.decode
        spelled = {token: str(decode([token])) for token in self._codec.special_ids}
        return ChainSplitter(self._codec.vocabulary, spelled, lambda ids: str(decode(ids)))

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Never: a prompt holds no open chain, and the parser itself follows a generation to its end."""
        return False

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Any) -> bool:
        """Never, as above."""
        return False

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """Tokens of the answer, its markers left out."""
        vocabulary = self._codec.vocabulary
        answer = vocabulary.step_id(vocabulary.answer)
        pairs = zip(input_ids, vocabulary.step_ids(input_ids), strict=True)
        return [token for token, step in pairs if step == answer and token not in vocabulary.kinds]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of the steps before the answer, their markers included."""
        answer = self._codec.vocabulary.step_id(self._codec.vocabulary.answer)
        return sum(0 < step < answer for step in self._codec.vocabulary.step_ids(token_ids))

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Reasoning and answer of a complete output."""
        reasoning, answer = split_chain(self._splitter(), model_output, self.mote_token_ids)
        return reasoning or None, answer

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """What is new in a stream."""
        parts: dict[bool, str] = {}
        for piece in self._follow.feed(current_text, delta_token_ids):
            parts[piece.is_answer] = parts.get(piece.is_answer, "") + piece.text
        return DeltaMessage(reasoning=parts.get(False), content=parts.get(True)) if parts else None

    def adjust_request(self, request: Any) -> Any:
        """Keep the markers in the output, and take ``steps`` and ``step_limit`` from the body of a request.

        Raises:
            ValueError: If the steps are not those of the served adapter, or another option contradicts them.
        """
        request.skip_special_tokens = False
        if hasattr(request, "spaces_between_special_tokens"):
            request.spaces_between_special_tokens = False
        extra = request.model_extra or {}
        body = {key: extra[key] for key in (STEPS, LIMIT) if extra.get(key) is not None}
        if (getattr(request, "kv_transfer_params", None) or {}).get("prompt_token_ids"):
            raise ValueError("kv_transfer_params must hold no prompt_token_ids: no template made them. Remove them.")
        values = (getattr(request, "vllm_xargs", None) or {}) | body
        if values:
            request.vllm_xargs = values
        if STEPS not in values:
            if LIMIT in values:
                raise ValueError(LIMIT_ALONE)
            return request
        for name in CONTRADICTING_REQUEST:  # here, so that a stream has not begun yet
            if getattr(request, name, None):
                raise ValueError(CONTRADICTION.format(name))
        formats = {
            "response_format": getattr(request, "response_format", None),  # of chat
            "text.format": getattr(getattr(request, "text", None), "format", None),  # of responses
        }
        for name, form in formats.items():
            if getattr(form, "type", "text") != "text":
                raise ValueError(CONTRADICTION.format(name))
        limits = (getattr(request, f"max_{kind}tokens", None) for kind in ("completion_", "", "output_"))
        check_request(values, self._codec.vocabulary, next((limit for limit in limits if limit), None))
        return request
