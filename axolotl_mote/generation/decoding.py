"""One batch of prompts to one batch of chains, with any decoding method that transformers offers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.result import Chain
from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.generation.grammar import Plan, StepGrammar, TokenBudget, make_budget

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
_RESERVED = ("logits_processor", "eos_token_id", "max_length", "num_return_sequences", "input_ids")


@dataclass(frozen=True)
class Decoder:
    """A model with everything that generation needs to know about it.

    Args:
        model: A model whose ``generate`` routes its tokens. Any: PeftModel, a plain model, or a wrapper of either.
        codec: Its codec; see ``loading.codec_for``.
        step_limits: Maximum text tokens of a step: one number for all, or one per step name.
        options: Arguments for ``model.generate``.
        seed: Seed of sampling; None leaves the global generator alone.

    Raises:
        ValueError: If an option is reserved, or beam search is combined with sampling.
    """

    model: Any
    codec: ChainCodec
    step_limits: int | Mapping[str, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in _RESERVED:
            if name in self.options:
                raise ValueError(f"{name} must be left to generate_chain; got {self.options[name]!r}. Remove it.")
        if self.options.get("do_sample") and (self.options.get("num_beams") or 1) > 1:
            raise ValueError(
                "do_sample must not be combined with num_beams; the grammar can leave fewer admissible tokens than a "
                "beam sampler draws. Drop one of the two."
            )

    @property
    def vocabulary(self) -> StepVocabulary:
        """The steps and their markers."""
        return self.codec.vocabulary

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
            ValueError: If the budget is too small or a prompt too long for the model.
        """
        has_check = plan.last != plan.answer
        budget = self._budget(plan, max_new_tokens - used, after)
        input_ids, attention_mask = pad_left(prompts, self.codec.pad_id, self.model.device)
        self._check_length(input_ids.shape[1] + budget.total)
        grammar = StepGrammar(
            self.codec,
            plan,
            budget,
            prompt_length=input_ids.shape[1],
            after=after,
            choices={plan.last: self.verdict_ids()} if has_check else None,
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
        longest = max(map(len, self.verdict_ids())) if plan.last != plan.answer else 1
        return make_budget(plan, self.vocabulary, total, self.step_limits, longest, after)

    def _generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, grammar: StepGrammar) -> torch.Tensor:
        options = _NEUTRAL | dict(self.options)
        with evaluating(self.model), seeded(self.seed, input_ids.device), torch.no_grad():
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList([grammar]),
                max_new_tokens=grammar.budget.total,
                eos_token_id=self.vocabulary.end_ids[grammar.plan.last - 1],
                pad_token_id=self.codec.pad_id,
                **options,
            )
        sequences: torch.Tensor = output if isinstance(output, torch.Tensor) else output.sequences
        return sequences

    def _check_length(self, needed: int) -> None:
        limit = context_length(self.model)
        if limit is not None and needed > limit:
            raise ValueError(
                f"question and max_new_tokens must fit the model's {limit} positions; got {needed}. "
                "Shorten the dialogue or lower max_new_tokens."
            )


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


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside the block: no dropout, question tokens are routed to the mean of the experts."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block and restore its generators afterwards; None does nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
