"""Answer each step with its own adapter: the baseline of separate models, which share nothing but the base.

``load_separate`` puts one plain LoRA per step on one base; ``generate_separate`` writes the steps in turn, each
by the adapter of its step, which reads the question and the steps before it with its own weights. Which steps to write
must be given: no model is trained to choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.result import Chain
from axolotl_mote.generation.decoding import Decoder, resolve_options
from axolotl_mote.generation.grammar import Plan
from axolotl_mote.generation.loading import codec_for, load_mote


def load_separate(folders: Mapping[str, str | Path], **options: Any) -> tuple[PeftModel, ChainCodec]:
    """One model with an adapter named after each step, and its codec; options are those of ``load_mote``."""
    first, *others = folders
    model, tokenizer = load_mote(folders[first], **options)
    codec = codec_for(model, tokenizer)
    model.load_adapter(str(folders[first]), adapter_name=first)
    for step in others:
        model.load_adapter(str(folders[step]), adapter_name=step)
    return model.eval(), codec


def generate_separate(
    model: PeftModel,
    codec: ChainCodec,
    dialogues: Sequence[Sequence[Mapping[str, str]]],
    steps: Sequence[str],
    max_new_tokens: int = 96,
    batch_size: int = 8,
) -> list[Chain]:
    """Answer dialogues with exactly these steps.

    Args:
        model: From ``load_separate``.
        codec: From ``load_separate``.
        dialogues: The questions.
        steps: Steps in order, the answer last.
        max_new_tokens: Tokens of one step, its markers included.
        batch_size: Dialogues decoded together.
    """
    decoder = Decoder(model, codec, options=resolve_options({}, codec.tokenizer))
    chains: list[Chain] = []
    for start in range(0, len(dialogues), batch_size):
        questions = [codec.encode_question(list(one)) for one in dialogues[start : start + batch_size]]
        written: list[list[int]] = [[] for _ in questions]
        before = 0
        for step in steps:
            number = codec.vocabulary.step_id(step)
            model.set_adapter(step)
            prompts = [question + tokens for question, tokens in zip(questions, written, strict=True)]
            parts = decoder.decode(prompts, _only(number, before, codec), max_new_tokens, after=before)
            written = [tokens + list(part.token_ids) for tokens, part in zip(written, parts, strict=True)]
            before = number
        chains += [codec.parse(tokens) for tokens in written]
    return chains


def _only(number: int, before: int, codec: ChainCodec) -> Plan:
    """The plan that admits one step after another and ends with it."""
    follows: list[tuple[int, ...]] = [()] * (len(codec.vocabulary.steps) + 1)
    follows[before] = (number,)
    return Plan(tuple(follows), number, number)
