"""What the journal says about a question, without any client."""

from __future__ import annotations

from axolotl_mote.builder.loop.generator import Outcome, generate_chain_calls
from axolotl_mote.builder.loop.journal import Journal
from axolotl_mote.builder.settings import Settings
from axolotl_mote.builder.texts.prompts import Prompts
from axolotl_mote.chain.questions import Messages, Question


class _NoMessages(Prompts):
    """The prompts of a replay: a call that the journal answers needs no messages."""

    def __init__(self, prompts: Prompts) -> None:
        vars(self).update(vars(prompts))

    def render(self, stage: str, messages: Messages, **texts: str | None) -> Messages:
        """Nothing."""
        return []


def replay(question: Question, settings: Settings, prompts: Prompts, journal: Journal) -> Outcome | None:
    """The outcome of a question, or None if a call that it needs is not recorded."""
    chain = generate_chain_calls(question, settings, _NoMessages(prompts))
    call = next(chain)
    while (completion := journal.get(call)) is not None:
        try:
            call = chain.send(completion)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
    return None
