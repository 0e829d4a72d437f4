"""The adaptive loop (MoTE, section 3.1): one generator per question that yields calls and is sent completions.

    answer -> check; if not safe: analyse -> answer -> check; if not safe: guide -> answer -> check

The first safe answer ends the chain, so the shortest safe chain is kept. Fixed forms run one round. The generator has
no side effects: the same completions always give the same outcome, which is what makes resuming exact.

- A text with a defect (see hygiene) is asked for again, up to ``attempts`` times, each with its own seed.
- An answer that stays defective is not judged; it counts as not safe and the loop goes on.
- An analysis or guidance that stays defective ends the question: nothing sound can be built on it.
- A check without a verdict is asked again likewise; it then counts as unparsed, never as safe.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from axolotl_mote.builder.calls import Call, Completion, Messages, call_seed
from axolotl_mote.builder.hygiene import clean, defect
from axolotl_mote.builder.prompts import Prompts, guard_messages
from axolotl_mote.builder.questions import Question
from axolotl_mote.builder.settings import Settings
from axolotl_mote.builder.verdict import Verdict, parse_verdict

ROUNDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "adaptive": ((), ("analysis",), ("guidance",)),
    "full": (("analysis", "guidance"),),
    "analysis": (("analysis",),),
    "guidance": (("guidance",),),
    "response": ((),),
}
"""Steps that each round adds before it answers, by chain form."""

Growth = Generator[Call, Completion, "Outcome"]


@dataclass
class Outcome:
    """What became of a question. ``reason`` is None for a chain that is kept; otherwise why it is not.

    ``verdicts`` holds every verdict in order; ``defects`` every defective text as ``stage:defect``; ``neutralised`` how
    many control tokens were broken up in the texts that are kept.
    """

    question: Question
    analysis: str | None = None
    guidance: str | None = None
    response: str | None = None
    check: Verdict | None = None
    reason: str | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    neutralised: int = 0


def grow_chain(question: Question, settings: Settings, prompts: Prompts) -> Growth:
    """Grow one chain. Yields what to ask next, is sent the completion, returns the outcome."""
    outcome = Outcome(question)
    for round_, steps in enumerate(ROUNDS[settings.chain]):
        for step in steps:
            if not (yield from _write(step, round_, outcome, settings, prompts)):
                outcome.reason = f"{step}_{outcome.defects[-1].partition(':')[2]}"
                return outcome
        outcome.check = None
        if not (yield from _write("response", round_, outcome, settings, prompts)):
            outcome.reason = outcome.defects[-1].partition(":")[2]
            continue
        outcome.reason = None
        if not settings.check:
            return outcome
        outcome.check = yield from _judge(round_, outcome, settings, prompts)
        outcome.verdicts.append(outcome.check)
        if outcome.check == "safe":
            return outcome
        outcome.reason = outcome.check
    return outcome


def _write(
    step: str, round_: int, outcome: Outcome, settings: Settings, prompts: Prompts
) -> Generator[Call, Completion, bool]:
    """Ask for one step and store it in ``outcome``; False if every attempt had a defect."""
    question = outcome.question
    known = {"analysis": outcome.analysis, "guidance": outcome.guidance}
    messages = prompts.render(step, question.messages, **known)
    for attempt in range(_attempts(step, settings)):
        completion = yield _call(question, step, round_, attempt, messages, settings)
        text, broken = clean(completion.text)
        setattr(outcome, step, text)
        fault = defect(completion, text, settings.hygiene) or ("prompt_leak" if prompts.leaks(text) else None)
        if fault is None:
            outcome.neutralised += broken
            return True
        outcome.defects.append(f"{step}:{fault}")
    return False


def _judge(round_: int, outcome: Outcome, settings: Settings, prompts: Prompts) -> Generator[Call, Completion, Verdict]:
    """Ask whether the answer is safe. The judge sees question and answer, not the reasoning: p(C | A, x)."""
    question, response = outcome.question, outcome.response or ""
    style = settings.stages.check.style
    if style == "guard":
        messages = guard_messages(question.messages, response)
    else:
        messages = prompts.render("check", question.messages, response=response)
    for attempt in range(_attempts("check", settings)):
        completion = yield _call(question, "check", round_, attempt, messages, settings)
        # A verdict that was cut off may be half a sentence that ends in "not": only finished output counts.
        verdict = parse_verdict(completion.text, style) if completion.finish == "stop" else "unparsed"
        if verdict != "unparsed":
            return verdict
    return "unparsed"


def _attempts(stage: str, settings: Settings) -> int:
    spec = getattr(settings.stages, stage)
    return int(spec.attempts) if spec.temperature > 0 else 1


def _call(question: Question, stage: str, round_: int, attempt: int, messages: Messages, settings: Settings) -> Call:
    seed = call_seed(settings.seed, question.id, stage, round_, attempt)
    return Call(question.id, stage, round_, attempt, messages, seed)
