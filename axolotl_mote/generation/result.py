"""What came out of a generation: `Chain`, and reading one off token ids.

Structure is read from marker *ids* alone. Text that merely looks like a marker is text, and nothing is ever searched
for in decoded strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from axolotl_mote.chain import end_of_turn_ids
from axolotl_mote.generation.vocabulary import StepVocabulary
from axolotl_mote.steps import CHECK


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
        answer_step: Name of the step the user sees.
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
    answer_step: str
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
    return Chain({}, {}, vocabulary.answer, False, (), False, vocabulary, ()).to_row() | {"error": error}


def parse_chain(
    ids: Iterable[int],
    vocabulary: StepVocabulary,
    tokenizer: Any,
    *,
    stop_ids: Iterable[int] = (),
    must_close: Callable[[int, int, int], bool] | None = None,
    expect_check: bool = False,
) -> Chain:
    """Read a chain off generated token ids.

    Args:
        ids: Tokens after the question. Reading stops at the first stop id, and where the template's end of turn
            begins after the answer.
        vocabulary: The steps and their markers.
        tokenizer: Decodes the text of a step.
        stop_ids: End-of-turn and padding.
        must_close: Tells whether a step was closed by force, from (step, text tokens, tokens before its end marker).
        expect_check: Whether the chain is only finished with its check step.

    Returns:
        The chain. Invalid ones are returned as far as they can be read, with ``valid`` and ``finished`` False.
    """
    turn_end = end_of_turn_ids(tokenizer)[0]  # can be ordinary text: a space before the token that ends the turn
    reader = _Reader(vocabulary, frozenset(stop_ids), turn_end, must_close)
    for token in ids:
        if not reader.read(int(token)):
            break
    reader.end()
    texts = {name: tokenizer.decode(text, skip_special_tokens=False) for name, text in reader.texts.items()}
    answer = vocabulary.answer
    wanted = {answer, CHECK} if expect_check else {answer}
    valid = reader.valid and answer in texts
    return Chain(
        texts=texts,
        token_counts={name: len(text) for name, text in reader.texts.items()},
        answer_step=answer,
        finished=valid and wanted <= set(texts) and answer not in reader.truncated and bool(texts[answer].strip()),
        truncated=tuple(reader.truncated),
        valid=valid,
        vocabulary=vocabulary,
        token_ids=tuple(reader.ids),
        spent=len(reader.ids),
    )


class _Reader:
    """Walks over token ids and keeps the text of each step."""

    def __init__(
        self,
        vocabulary: StepVocabulary,
        stop_ids: frozenset[int],
        turn_end: int,
        must_close: Callable[[int, int, int], bool] | None,
    ) -> None:
        self.kinds = vocabulary.kinds()
        self.names: Sequence[str] = vocabulary.steps
        self.answer = vocabulary.answer
        self.stop_ids = stop_ids
        self.turn_end = turn_end
        self.must_close = must_close
        self.texts: dict[str, list[int]] = {}
        self.truncated: list[str] = []
        self.ids: list[int] = []
        self.valid = True
        self._open = 0
        self._last = 0
        self._text: list[int] = []

    def read(self, token: int) -> bool:
        """Take one token; False once the turn is over."""
        kind = self.kinds.get(token, 0)
        if token in self.stop_ids and not kind:
            return False
        if token == self.turn_end and not self._open and self.answer in self.texts:
            return False
        if kind > 0:
            self.valid &= not self._open and kind > self._last
            self.end()
            self._open, self._last, self._text = kind, max(kind, self._last), []
        elif kind < 0:
            self.valid &= -kind == self._open
            self._close(forced=False)
        elif self._open:
            self._text.append(token)
        else:
            self.valid = False
        self.ids.append(token)
        return True

    def end(self) -> None:
        """A step that is still open here was never closed."""
        if self._open:
            self.valid = False
            self._close(forced=True)

    def _close(self, forced: bool) -> None:
        if not self._open:
            return
        name = self.names[self._open - 1]
        forced = forced or (self.must_close is not None and self.must_close(self._open, len(self._text), len(self.ids)))
        if name in self.texts:
            self.valid = False  # a step twice: the first one stands
        else:
            self.texts[name] = self._text
            if forced:
                self.truncated.append(name)
        self._open = 0
