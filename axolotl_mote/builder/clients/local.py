"""Client for a transformers model in this process: batched generation with one seed per row.

The same batch on the same machine gives the same texts. A resumed build forms the same batches, so it equals an
uninterrupted one. A row's random numbers depend on its own seed alone, but its logits can differ in the last bits with
the rows beside it (padding, other kernels), and in rare cases that changes a token. So another ``batch_size`` counts as
another configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from axolotl_mote.builder.clients.calls import BudgetMeter, Call, Completion
from axolotl_mote.builder.settings import LocalModel, Stage
from axolotl_mote.builder.texts.verdict import VERDICT_LINES
from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.questions import Messages
from axolotl_mote.chain.templates import fix_variables
from axolotl_mote.generation.decoding import context_length, pad_left

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class SeededGumbelNoise(LogitsProcessor):
    """Adds Gumbel noise, so that the largest score is a draw from softmax(scores): sampling by greedy decoding.

    Each row has its own generator, so its draws do not depend on the rows beside it.

    Args:
        seeds: One per row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = seeds
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores plus noise, shape (B, V)."""
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        uniform = torch.stack(
            [
                torch.rand(scores.shape[1], generator=g, device=scores.device, dtype=torch.float32)
                for g in self._generators
            ]
        )  # (B, V)
        tiny = torch.finfo(torch.float32).tiny
        return scores - (-uniform.clamp_min(tiny).log()).clamp_min(tiny).log().to(scores.dtype)


class LocalClient:
    """Generates with a transformers model.

    Args:
        spec: The model.
        budget: Shared by all clients of a run.

    Raises:
        ValueError: If the tokenizer has no chat template, or one that does not read the variables.
    """

    def __init__(self, spec: LocalModel, budget: BudgetMeter) -> None:
        self.spec, self._budget = spec, budget
        common: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(spec.path, **common)
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"models.*.path must have a chat template; got {spec.path} without one. Use an instruct model."
            )
        if spec.chat_template_kwargs:
            template = str(self._tokenizer.get_chat_template())
            self._tokenizer.chat_template = fix_variables(template, spec.chat_template_kwargs)
        self._codec = ChainCodec(self._tokenizer)
        self._rejects_system = _rejects_system(self._codec)
        device = spec.device if spec.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(spec.path, dtype=spec.dtype, **common)
        self._model: PreTrainedModel = model.to(device).eval()
        self._ends = _end_ids(self._model, self._tokenizer)
        self._verdicts = [[*self._codec.encode_text(line), self._ends[0]] for line in VERDICT_LINES]
        self._limit = context_length(self._model)
        self.name = _name(spec)

    def complete_batch(self, calls: Sequence[Call], stage: Stage) -> list[Completion]:
        """Generate for a batch.

        Args:
            calls: B calls of one stage.
            stage: How to sample.

        Returns:
            B completions; a call that does not fit into the model's context, or that the chat template rejects, is
            ``refused``.

        Raises:
            BudgetReached: If the budget does not allow B requests.
        """
        self._budget.start(len(calls))
        encoded = [self._encode(call.messages, stage) for call in calls]
        rows = [(ids, call.seed) for ids, call in zip(encoded, calls, strict=True) if not isinstance(ids, str)]
        texts = iter(self._generate([ids for ids, _ in rows], [seed for _, seed in rows], stage) if rows else [])
        results = [
            Completion(ids, "refused", model=self.name) if isinstance(ids, str) else self._completion(ids, next(texts))
            for ids in encoded
        ]
        for completion in results:
            self._budget.finish(completion)
        return results

    def _encode(self, messages: Messages, stage: Stage) -> list[int] | str:
        """Token ids of a prompt, or why this model cannot be asked."""
        try:
            ids = self._codec.encode_question(_fold_system(messages) if self._rejects_system else messages)
        except ValueError as error:
            return str(error)
        fits = self._limit is None or len(ids) + stage.max_new_tokens <= self._limit
        return ids if fits else f"{len(ids)} prompt tokens do not fit into {self._limit}"

    def _completion(self, prompt: list[int], new_ids: list[int]) -> Completion:
        ended = bool(new_ids) and new_ids[-1] in self._ends
        text = self._tokenizer.decode(new_ids[:-1] if ended else new_ids, skip_special_tokens=False)
        return Completion(text, "stop" if ended else "length", len(prompt), len(new_ids), self.name)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], seeds: list[int], stage: Stage) -> list[list[int]]:
        """New token ids of each row, up to and including its first end token."""
        pad = self._codec.pad_id
        input_ids, attention_mask = pad_left(prompts, pad, self._model.device)
        width = input_ids.shape[1]
        first = [_only(self._verdicts, width)] if getattr(stage, "constrained", False) else []
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=_processors(stage, seeds, first),
            generation_config=_greedy(self._model.generation_config, stage.max_new_tokens, self._ends, pad),
        )
        return [_up_to_end(row[width:], self._ends) for row in output.tolist()]


def _rejects_system(codec: ChainCodec) -> bool:
    """Whether the chat template raises an error at a system turn, as Gemma's and Mistral's do."""
    try:
        codec.encode_question([{"role": role, "content": "x"} for role in ("system", "user")])
    except ValueError:
        return True
    return False


def _fold_system(messages: Messages) -> Messages:
    """The dialogue with its system turn put before the text of the first user turn."""
    first = next((i for i, turn in enumerate(messages) if turn["role"] == "user"), 0)
    if messages[0]["role"] != "system" or not first:
        return messages
    content = f"{messages[0]['content']}\n\n{messages[first]['content']}"
    return [*messages[1:first], {"role": "user", "content": content}, *messages[first + 1 :]]


def _processors(stage: Stage, seeds: list[int], first: Sequence[LogitsProcessor]) -> LogitsProcessorList:
    """Greedy if temperature is 0, else a seeded draw after temperature and top-p; ``first`` runs before these."""
    if stage.temperature == 0:
        return LogitsProcessorList(first)
    warpers: list[LogitsProcessor] = [*first, TemperatureLogitsWarper(float(stage.temperature))]
    if stage.top_p < 1:
        warpers.append(TopPLogitsWarper(stage.top_p))
    return LogitsProcessorList([*warpers, SeededGumbelNoise(seeds)])


def _only(choices: Sequence[list[int]], prompt_width: int) -> LogitsProcessor:
    """Allows only a few token sequences."""

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        done = ids[prompt_width:].tolist()
        fitting = {c[len(done)] for c in choices if len(c) > len(done) and c[: len(done)] == done}
        # generate pads a row that has ended, whatever is allowed; any token will do.
        return sorted(fitting) or [choices[0][-1]]

    return PrefixConstrainedLogitsProcessor(allowed, num_beams=1)


def _greedy(base: GenerationConfig, max_new_tokens: int, ends: list[int], pad: int) -> GenerationConfig:
    """A new generation config, so that the sampling defaults of the model folder do not apply."""
    return type(base)(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        bos_token_id=base.bos_token_id,
    )


def _name(spec: LocalModel) -> str:
    """Path of a local model; name and commit, ``org/model@0123abc...``, of one from the hub."""
    from huggingface_hub import try_to_load_from_cache

    if Path(spec.path).exists():
        return spec.path
    cached = try_to_load_from_cache(spec.path, "config.json", revision=spec.revision)
    return f"{spec.path}@{Path(cached).parent.name}" if isinstance(cached, str) else spec.path


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a turn: the tokenizer's and the generation config's."""
    ends = model.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    found = sorted({i for i in [*ends, tokenizer.eos_token_id] if i is not None})
    if not found:
        raise ValueError("models.*.path must have an end-of-sequence token; got none. Set eos_token in its tokenizer.")
    return found


def _up_to_end(ids: list[int], ends: list[int]) -> list[int]:
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    return ids if stop is None else ids[: stop + 1]
