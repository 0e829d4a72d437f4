"""What comes out of a generation: `Chain`, as an object and as a plain row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from axolotl_mote.chain.steps import CHECK
from axolotl_mote.chain.vocabulary import StepVocabulary


@dataclass(frozen=True)
class Attempt:
    """One try of the verify mode: the steps of the chain, the verdict on its answer, the tokens newly generated."""

    steps: tuple[str, ...]
    verdict: str
    tokens: int


@dataclass(frozen=True)
class Chain:
    """A generated reasoning chain.

    Every trained step is an attribute: ``chain.analysis``, ``chain.response``; a step the chain lacks is None. For step
    names that collide with a field use ``chain.texts``.

    Args:
        texts: Text of each step of the chain, in order.
        token_counts: Tokens of each step, its two markers not counted.
        finished: Whether the model itself ended the answer; False if it was cut at a limit, is blank, or the chain is
            invalid.
        truncated: Steps that were closed because a limit or the budget was used up.
        valid: Whether the tokens form a chain: known steps in order, each closed, nothing between them, one answer.
        vocabulary: The steps of the model.
        token_ids: Everything generated, markers included, from the first start marker to the last end marker.
        spent: Tokens generated for this chain; in verify mode those of the rejected attempts included.
        verdict: "safe" or "unsafe" as judged in verify mode; None elsewhere.
        attempts: The tries of verify mode.
    """

    texts: dict[str, str]
    token_counts: dict[str, int]
    finished: bool
    truncated: tuple[str, ...]
    valid: bool
    vocabulary: StepVocabulary = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)
    spent: int = 0
    verdict: str | None = None
    attempts: tuple[Attempt, ...] = ()

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps the chain holds, in order."""
        return tuple(self.texts)

    @property
    def answer_step(self) -> str:
        """Name of the step the user sees."""
        return self.vocabulary.answer

    @property
    def answer(self) -> str:
        """Text of the answer step; empty if the chain has none."""
        return self.texts.get(self.answer_step, "")

    @property
    def analysis(self) -> str | None:
        """Text of the analysis step."""
        return self.texts.get("analysis")

    @property
    def guidance(self) -> str | None:
        """Text of the guidance step."""
        return self.texts.get("guidance")

    @property
    def response(self) -> str | None:
        """Text of the response step."""
        return self.texts.get("response")

    @property
    def check(self) -> str | None:
        """Verdict on the answer: the check step's text, else that of verify mode's judge."""
        return self.texts.get(CHECK, self.verdict)

    def __getattr__(self, name: str) -> str | None:
        vocabulary = self.__dict__.get("vocabulary")
        if vocabulary is not None and name in vocabulary.steps:
            text: str | None = self.texts.get(name)
            return text
        raise AttributeError(f"Chain has no step or field {name!r}")

    def message(self) -> dict[str, str]:
        """The assistant message that stands for this chain in the history of a dialogue: the answer alone."""
        return {"role": "assistant", "content": self.answer}

    def to_row(self) -> dict[str, Any]:
        """The chain as plain data: every trained step and ``check`` (null when absent), then what is known about it.

        The keys are always the same, so that no column of a question passes for something generated.
        """
        row: dict[str, Any] = {name: self.texts.get(name) for name in self.vocabulary.steps}
        row[CHECK] = self.check
        return row | {
            "steps": list(self.steps),
            "token_counts": dict(self.token_counts),
            "finished": self.finished,
            "truncated": list(self.truncated),
            "valid": self.valid,
            "spent": self.spent,
            "attempts": [{"steps": list(a.steps), "verdict": a.verdict, "tokens": a.tokens} for a in self.attempts],
            "error": None,
        }


def refused_row(vocabulary: StepVocabulary, error: str) -> dict[str, Any]:
    """The row of a question that was not answered: that of an empty chain, with the reason."""
    empty = Chain(
        texts={}, token_counts={}, finished=False, truncated=(), valid=False, vocabulary=vocabulary, token_ids=()
    )
    return empty.to_row() | {"error": error}
