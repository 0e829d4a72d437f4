"""One batch of prompts to one batch of chains, with any decoding method that transformers offers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.result import Chain
from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.generation.grammar import Plan, StepGrammar, TokenBudget, make_budget

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERDICTS = ("safe", "unsafe")

# Sampling values of a base model's generation_config.json would otherwise leak into a greedy run.
_NEUTRAL = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
}
_RESERVED = (
    "input_ids",
    "attention_mask",
    "logits_processor",
    "eos_token_id",
    "pad_token_id",
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "num_return_sequences",
)
"""What the chain decides: the grammar closes the last step, so that no other length or end can be right."""

_TOKENS_OF_MODELS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version")
"""What every model's generation_config.json holds; the tokenizer's chat template decides it here."""

_sampling = threading.Lock()
"""Torch draws from one generator for the whole process: generations that sample take turns."""


def resolve_options(options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments of ``model.generate`` that a caller's options stand for.

    Args:
        options: Arguments of ``model.generate``, among them perhaps a ``generation_config``, whose values count where
            no argument of their own is given.
        tokenizer: Reads ``stop_strings``.

    Returns:
        Greedy decoding, whatever the base model's defaults are, changed by the options.

    Raises:
        ValueError: If an option is reserved, or beam search is combined with sampling.
    """
    named = dict(options)
    config = named.pop("generation_config", None)
    if config is not None:
        if not isinstance(config, GenerationConfig):
            raise ValueError(
                f"generation_config must be a GenerationConfig; got {type(config).__name__}. Pass its values alone."
            )
        named = {k: v for k, v in config.to_diff_dict().items() if k not in _TOKENS_OF_MODELS} | named
    for name in _RESERVED:
        if name in named:
            raise ValueError(f"{name} must be left to generate_chain; got {named[name]!r}. Remove it.")
    if named.get("do_sample") and (named.get("num_beams") or 1) > 1:
        raise ValueError(
            "do_sample must not be combined with num_beams; the grammar can leave fewer admissible tokens than a "
            "beam sampler draws. Drop one of the two."
        )
    if named.get("stop_strings") is not None:
        named["tokenizer"] = tokenizer
    return _NEUTRAL | named


@dataclass(frozen=True)
class Decoder:
    """A model with everything that generation needs to know about it.

    Args:
        model: A model whose ``generate`` routes its tokens. Any: PeftModel, a plain model, or a wrapper of either.
        codec: Its codec; see ``loading.codec_for``.
        step_limits: Maximum text tokens of a step: one number for all, or one per step name.
        options: Arguments for ``model.generate``, from ``resolve_options``.
        seed: Seed of sampling; None leaves the global generator alone.
    """

    model: Any
    codec: ChainCodec
    step_limits: int | Mapping[str, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    @property
    def vocabulary(self) -> StepVocabulary:
        """The steps and their markers."""
        return self.codec.vocabulary

    @cached_property
    def verdict_ids(self) -> list[list[int]]:
        """Token sequences of the two verdicts."""
        return [self.codec.encode_text(text) for text in VERDICTS]

    def decode(
        self, prompts: Sequence[Sequence[int]], plan: Plan, max_new_tokens: int, after: int = 0, used: int = 0
    ) -> list[Chain]:
        """Generate one chain for each prompt of a batch.

        Args:
            prompts: Token ids of the questions, plus any steps that are already complete.
            plan: Which step may follow which.
            max_new_tokens: Tokens of the whole chain, markers and ``used`` included.
            after: Step that is complete at the end of every prompt; 0: none.
            used: Tokens of the chain that every prompt already holds.

        Raises:
            ValueError: If the budget is too small.
        """
        has_check = plan.last != plan.answer
        budget = self._budget(plan, max_new_tokens - used, after)
        input_ids, attention_mask = pad_left(prompts, self.codec.pad_id, self.model.device)
        grammar = StepGrammar(
            self.codec,
            plan,
            budget,
            prompt_length=input_ids.shape[1],
            after=after,
            choices={plan.last: self.verdict_ids} if has_check else None,
        )
        output = self._generate(input_ids, attention_mask, grammar)
        return [
            self.codec.parse(row, must_close=grammar.must_close, expect_check=has_check)
            for row in output[:, input_ids.shape[1] :].tolist()
        ]

    def fits(self, plan: Plan, max_new_tokens: int, after: int, used: int) -> bool:
        """Whether the budget leaves room for the shortest completion of a chain that already has ``used`` tokens."""
        try:
            self._budget(plan, max_new_tokens - used, after)
        except ValueError:
            return False
        return True

    def _budget(self, plan: Plan, total: int, after: int) -> TokenBudget:
        longest = max(map(len, self.verdict_ids)) if plan.last != plan.answer else 1
        return make_budget(plan, self.vocabulary, total, self.step_limits, longest, after)

    def _generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, grammar: StepGrammar) -> torch.Tensor:
        samples = bool(self.options["do_sample"])
        with evaluating(self.model), drawing(samples, self.seed, input_ids.device), torch.no_grad():
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList([grammar]),
                max_new_tokens=grammar.budget.total,
                eos_token_id=self.vocabulary.end_ids[grammar.plan.last - 1],
                pad_token_id=self.codec.pad_id,
                **self.options,
            )
        sequences: torch.Tensor = output if isinstance(output, torch.Tensor) else output.sequences
        return sequences


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths as one batch: ids and attention mask, both (B, T)."""
    length = max(map(len, prompts))
    ids = [[pad_id] * (length - len(p)) + list(p) for p in prompts]
    mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def context_length(model: Any) -> int | None:
    """Number of positions of a model; None if its configuration gives none."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


def length_fault(model: Any, needed: int) -> str | None:
    """Why a question and ``max_new_tokens`` are too long for a model together; None if they fit."""
    limit = context_length(model)
    if limit is None or needed <= limit:
        return None
    return (
        f"question and max_new_tokens must fit the model's {limit} positions; got {needed}. "
        "Shorten the dialogue or lower max_new_tokens."
    )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside the block: no dropout, question tokens are routed to the mean of the experts.

    A model that is in it already is left alone, so threads may share one; a model in training mode belongs to one.
    """
    if not any(module.training for module in model.modules()):
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def drawing(samples: bool, seed: int | None, device: torch.device) -> Iterator[None]:
    """Have torch's random generators to oneself while a generation samples, and restore them if it has a seed.

    Args:
        samples: Whether the generation draws at all; if not, nothing happens.
        seed: Where its draws begin; None: wherever the generators are.
        device: Where it draws.
    """
    if not samples:
        yield
        return
    with _sampling:
        if seed is None:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
