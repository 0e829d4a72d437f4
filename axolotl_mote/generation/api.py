"""`generate_chain`: dialogues in, chains out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from axolotl_mote.chain import check_messages, encode_question
from axolotl_mote.generation.decoding import Decoder
from axolotl_mote.generation.grammar import make_plan
from axolotl_mote.generation.result import Chain
from axolotl_mote.generation.verify import Judge, verify_chains

VERIFY = "verify"

Message = dict[str, str]


@overload
def generate_chain(
    model: Any, tokenizer: Any, messages: Sequence[Message], steps: str | Sequence[str] = ..., **kwargs: Any
) -> Chain: ...


@overload
def generate_chain(
    model: Any, tokenizer: Any, messages: Sequence[Sequence[Message]], steps: str | Sequence[str] = ..., **kwargs: Any
) -> list[Chain]: ...


def generate_chain(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Any],
    steps: str | Sequence[str] = "adaptive",
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
        model: From ``load_mote``.
        tokenizer: From ``load_mote``.
        messages: One dialogue (a list of ``{"role", "content"}``, ending with a user turn) or a list of dialogues.
            Earlier assistant turns stand as their answers alone; marker strings inside a message are ordinary text.
        steps: "adaptive": the model picks its steps; a list such as ``["analysis", "response"]``: exactly these;
            "verify": answer at once, judge, and add reasoning steps while the answer is judged unsafe.
        max_new_tokens: Tokens of one chain, markers included. Reasoning, however long, leaves the answer its share.
        check: Let the trained check step judge the answer at the end of the chain.
        step_limits: Most text tokens of a step: one number for all steps, or one per name. A step that reaches its
            limit is closed; ``chain.truncated`` names it.
        batch_size: Dialogues decoded together.
        seed: Seed of sampling; the caller's random state is left untouched.
        judge: Verify mode only: takes dialogues and answers, returns "safe" or "unsafe" for each. Default: the trained
            check step, else the base model without its adapter.
        **options: For ``model.generate``: ``do_sample``, ``temperature``, ``top_p``, ``num_beams``, ``streamer``,
            ``cache_implementation``, ``assistant_model`` ... Default is greedy, whatever the base model's defaults are.

    Returns:
        A chain, or a list of chains in the order of the dialogues.

    Raises:
        ValueError: If steps, limits or dialogues break their rules.
    """
    single = bool(messages) and isinstance(messages[0], Mapping)
    dialogues: list[Sequence[Message]] = [messages] if single else list(messages)
    for place, dialogue in enumerate(dialogues):
        if faults := check_messages(dialogue):
            raise ValueError(f"dialogue {place}: {' '.join(faults)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}. Use 1 for one dialogue at a time.")
    if judge is not None and steps != VERIFY:
        raise ValueError("judge must come with steps='verify'; other modes judge nothing. Remove it or change steps.")
    decoder = Decoder(model, tokenizer, step_limits, options, seed)
    plan = None if steps == VERIFY else make_plan(steps, decoder.vocabulary, check)
    chains: list[Chain] = []
    for start in range(0, len(dialogues), batch_size):
        batch = dialogues[start : start + batch_size]
        # With one seed every batch would draw alike.
        seeded = decoder if seed is None else replace(decoder, seed=seed + start)
        if plan is None:
            chains += verify_chains(seeded, batch, max_new_tokens, judge)
        else:
            chains += seeded.decode([encode_question(tokenizer, list(d)) for d in batch], plan, max_new_tokens)
    return chains[0] if single else chains
