"""`generate_chain`: dialogues in, chains out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from axolotl_mote.chain.questions import Messages
from axolotl_mote.chain.result import Chain
from axolotl_mote.chain.rows import check_messages
from axolotl_mote.chain.steps import ADAPTIVE, VERIFY
from axolotl_mote.files import raise_faults
from axolotl_mote.generation.decoding import Decoder, length_fault, resolve_options
from axolotl_mote.generation.grammar import make_plan
from axolotl_mote.generation.loading import codec_for
from axolotl_mote.generation.verify import Judge, verify_chains

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@overload
def generate_chain(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    steps: str | Sequence[str] = ...,
    max_new_tokens: int = ...,
    *,
    check: bool = ...,
    step_limits: int | Mapping[str, int] | None = ...,
    batch_size: int = ...,
    seed: int | None = ...,
    judge: Judge | None = ...,
    **options: Any,
) -> Chain: ...


@overload
def generate_chain(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Sequence[Mapping[str, str]]],
    steps: str | Sequence[str] = ...,
    max_new_tokens: int = ...,
    *,
    check: bool = ...,
    step_limits: int | Mapping[str, int] | None = ...,
    batch_size: int = ...,
    seed: int | None = ...,
    judge: Judge | None = ...,
    **options: Any,
) -> list[Chain]: ...


def generate_chain(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    steps: str | Sequence[str] = ADAPTIVE,
    max_new_tokens: int = 512,
    *,
    check: bool = False,
    step_limits: int | Mapping[str, int] | None = None,
    batch_size: int = 8,
    seed: int | None = None,
    judge: Judge | None = None,
    **options: Any,
) -> Chain | list[Chain]:
    """Answer one dialogue or a list of them with a reasoning chain.

    Example::

        model, tokenizer = load_mote("outputs/mote")
        chain = generate_chain(model, tokenizer, [{"role": "user", "content": "How do I kill a Python process?"}])
        print(chain.response, chain.steps, chain.token_counts, chain.finished)

    Args:
        model: From ``load_mote``; also a plain model whose tokenizer holds step markers (a baseline, an export).
        tokenizer: Its tokenizer.
        messages: One dialogue (a list of ``{"role", "content"}``, ending with a user turn) or a list of dialogues.
            Earlier assistant turns hold their answers alone; marker strings inside a message are ordinary text.
        steps: "adaptive": the model chooses its steps; a list such as ``["analysis", "response"]``: exactly these;
            "verify": answer at once, judge, and add reasoning steps while the answer is judged unsafe.
        max_new_tokens: Tokens of one chain, markers included. A share is reserved for the answer, however long the
            reasoning.
        check: Let the trained check step judge the answer at the end of the chain.
        step_limits: Maximum text tokens of a step: one number for all steps, or one per name. A step that reaches its
            limit is closed; ``chain.truncated`` names it.
        batch_size: Dialogues decoded together.
        seed: Seed of sampling; the caller's random state is left untouched.
        judge: Verify mode only: takes dialogues and answers, returns "safe" or "unsafe" for each. Default: the trained
            check step, else the base model without its adapter.
        **options: For ``model.generate``: ``do_sample``, ``temperature``, ``top_p``, ``num_beams``, ``streamer``,
            ``stop_strings``, ``cache_implementation``, ``assistant_model`` ... or a ``generation_config``, whose values
            count where no argument of their own is given. Default is greedy, whatever the base model's defaults are.

    Returns:
        A chain, or a list of chains in the order of the dialogues.

    Raises:
        ValueError: If steps, limits or dialogues break their rules, before anything is generated; dialogues are
            numbered from 0, as in the list.
    """
    single = bool(messages) and isinstance(messages[0], Mapping)
    dialogues: list[Messages] = [list(messages)] if single else list(messages)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}. Use 1 for one dialogue at a time.")
    if judge is not None and steps != VERIFY:
        raise ValueError(
            f"judge must come with steps='verify'; got steps={steps!r}, which never judges. Remove it or change steps."
        )
    _raise_all([" ".join(check_messages(dialogue)) for dialogue in dialogues], single)
    codec = codec_for(model, tokenizer)
    decoder = Decoder(model, codec, step_limits, resolve_options(options, tokenizer), seed)
    plan = None if steps == VERIFY else make_plan(steps, decoder.vocabulary, check)
    prompts = _encode_questions(decoder, dialogues, max_new_tokens, single)
    chains: list[Chain] = []
    for start in range(0, len(dialogues), batch_size):
        batch = slice(start, start + batch_size)
        # With one seed every batch would draw alike.
        seeded = decoder if seed is None else replace(decoder, seed=seed + start)
        if plan is None:
            chains += verify_chains(seeded, dialogues[batch], prompts[batch], max_new_tokens, judge)
        else:
            chains += seeded.decode(prompts[batch], plan, max_new_tokens)
    return chains[0] if single else chains


def _encode_questions(
    decoder: Decoder, dialogues: Sequence[Messages], max_new_tokens: int, single: bool
) -> list[list[int]]:
    """Token ids of all dialogues, so that one that cannot be answered is found before any batch is generated.

    Raises:
        ValueError: If the chat template refuses dialogues or they are too long, naming them all.
    """
    prompts: list[list[int]] = []
    faults: list[str | None] = []
    for dialogue in dialogues:
        try:
            prompts.append(decoder.codec.encode_question(dialogue))
            faults.append(length_fault(decoder.model, len(prompts[-1]) + max_new_tokens))
        except ValueError as error:
            faults.append(str(error))
    _raise_all(faults, single)
    return prompts


def _raise_all(faults: Sequence[str | None], single: bool) -> None:
    """Raise the faults of all dialogues, by number, or that of the one dialogue."""
    if single and faults[0]:
        raise ValueError(faults[0])
    named = [f"dialogue {number}: {fault}" for number, fault in enumerate(faults) if fault]
    raise_faults(named, f"messages must hold dialogues that can be answered; got {{faults}} among {len(faults)}.")
