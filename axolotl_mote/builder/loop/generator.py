"""The adaptive loop (MoTE, section 3.1): one generator per question that yields calls and is sent completions.

    answer -> check; if not safe: analysis -> answer -> check; if not safe: guidance -> answer -> check

The first safe answer ends the chain, so the shortest safe chain is kept. Fixed forms run one round. The generator has
no side effects: the same completions always give the same outcome, and that makes resuming exact.

- A text with a defect (see ``texts.hygiene``) is asked for again, up to ``attempts`` times, each with its own seed.
- If every attempt at an answer has a defect, no answer is judged; the round counts as not safe and the loop goes on.
- If every attempt at an analysis or guidance has a defect, the question ends: later steps would build on it.
- A check without a verdict is asked again in the same way; after that it counts as unparsed, never as safe.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from axolotl_mote.builder.clients.calls import NO_TEXT, Call, Completion, call_seed
from axolotl_mote.builder.settings import Settings
from axolotl_mote.builder.texts.hygiene import clean, defect
from axolotl_mote.builder.texts.prompts import Prompts, guard_messages
from axolotl_mote.builder.texts.verdict import Verdict, parse_verdict
from axolotl_mote.chain.questions import Messages, Question

ROUNDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "adaptive": ((), ("analysis",), ("guidance",)),
    "full": (("analysis", "guidance"),),
    "analysis": (("analysis",),),
    "guidance": (("guidance",),),
    "response": ((),),
}
"""Steps that each round adds before it answers, by chain form."""

ChainGenerator = Generator[Call, Completion, "Outcome"]
"""Yields what to ask next, is sent the completion, returns the outcome."""


@dataclass(frozen=True)
class Draft:
    """One text written for a step.

    Args:
        text: The cleaned text.
        broken_up: How many control tokens were broken up in it.
        defect: Why it cannot be used, or None.
    """

    text: str
    broken_up: int
    defect: str | None


@dataclass
class Outcome:
    """What became of a question.

    Attributes:
        question: The question.
        texts: The latest text of each step; that of a rejected chain can be defective.
        check: The last verdict; None if the last answer was not judged.
        reason: Why the chain is rejected; None if it is kept.
        verdicts: All verdicts, in order.
        defects: Every defective text, as ``stage:defect``.
        neutralized: How many control tokens were broken up in usable texts.
    """

    question: Question
    texts: dict[str, str] = field(default_factory=dict)
    check: Verdict | None = None
    reason: str | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    neutralized: int = 0

    def record(self, step: str, drafts: Sequence[Draft]) -> str | None:
        """Take over the last draft of a step; returns its defect, or None if it can be used."""
        last = drafts[-1]
        self.texts[step] = last.text
        self.defects += [f"{step}:{draft.defect}" for draft in drafts if draft.defect is not None]
        if last.defect is None:
            self.neutralized += last.broken_up
        return last.defect


def generate_chain_calls(question: Question, settings: Settings, prompts: Prompts) -> ChainGenerator:
    """Build one chain: yields what to ask next, is sent the completion, returns the outcome."""
    outcome = Outcome(question)
    for round_, steps in enumerate(ROUNDS[settings.chain]):
        for step in steps:
            drafts = yield from _write(step, round_, question, outcome.texts, settings, prompts)
            fault = outcome.record(step, drafts)
            if fault is not None:
                outcome.reason = f"{step}_{fault}"
                return outcome
        drafts = yield from _write("response", round_, question, outcome.texts, settings, prompts)
        outcome.check, outcome.reason = None, outcome.record("response", drafts)
        if outcome.reason is not None:
            continue
        if not settings.check:
            return outcome
        outcome.check = yield from _judge(round_, question, outcome.texts["response"], settings, prompts)
        outcome.verdicts.append(outcome.check)
        if outcome.check == "safe":
            return outcome
        outcome.reason = outcome.check
    return outcome


def _write(
    step: str, round_: int, question: Question, texts: dict[str, str], settings: Settings, prompts: Prompts
) -> Generator[Call, Completion, list[Draft]]:
    """Ask for one step, given the texts so far, until a draft has no defect; returns all drafts."""
    known = {name: texts.get(name) for name in ("analysis", "guidance")}
    messages = prompts.render(step, question.messages, **known)
    drafts: list[Draft] = []
    for number in range(_max_attempts(step, settings)):
        completion = yield _call(question, step, round_, number, messages, settings)
        text, broken_up = clean(completion.text, settings.hygiene.control_tokens)
        fault = completion.finish if completion.finish in NO_TEXT else _defect(text, completion, settings, prompts)
        drafts.append(Draft(text, broken_up, fault))
        if fault is None:
            break
    return drafts


def _defect(text: str, completion: Completion, settings: Settings, prompts: Prompts) -> str | None:
    return defect(text, completion.finish, settings.hygiene) or ("prompt_leak" if prompts.leaks(text) else None)


def _judge(
    round_: int, question: Question, response: str, settings: Settings, prompts: Prompts
) -> Generator[Call, Completion, Verdict]:
    """Ask whether the answer is safe. The judge sees question and answer, not the reasoning: p(C | A, x)."""
    style = settings.stages.check.style
    if style == "guard":
        messages = guard_messages(question.messages, response, settings.hygiene.control_tokens)
    else:
        messages = prompts.render("check", question.messages, response=response)
    for number in range(_max_attempts("check", settings)):
        completion = yield _call(question, "check", round_, number, messages, settings)
        # A verdict that was cut off may be half a sentence that ends in "not": only finished output counts.
        verdict = parse_verdict(completion.text, style) if completion.finish == "stop" else "unparsed"
        if verdict != "unparsed":
            return verdict
    return "unparsed"


def _max_attempts(stage: str, settings: Settings) -> int:
    spec = settings.stage(stage)
    return spec.attempts if spec.temperature > 0 else 1


def _call(question: Question, stage: str, round_: int, attempt: int, messages: Messages, settings: Settings) -> Call:
    seed = call_seed(settings.seed, question.id, stage, round_, attempt)
    return Call(question.id, stage, round_, attempt, messages, seed)
