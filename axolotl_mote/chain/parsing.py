"""A chain read off token ids, one token at a time.

Structure is read from marker *ids* alone. Text that merely looks like a marker is text, and nothing is ever searched
for in decoded strings.
"""

from __future__ import annotations

from collections.abc import Callable

from axolotl_mote.chain.vocabulary import StepVocabulary, advance

MustClose = Callable[[int, int, int], bool]
"""Tells whether a step was closed by force, from (step id, text tokens, tokens before its end marker)."""


class ChainParser:
    """Collects the text tokens of each step, and judges whether the tokens form a valid chain.

    Args:
        vocabulary: The steps and their markers.
        stop_ids: Tokens that end the turn: end of turn, padding.
        turn_end: Token that ends the turn once the answer is complete: the first of the template's end of turn, which
            can be ordinary text.
        must_close: Tells whether a step was closed by force; None: none was.

    Attributes:
        texts: Text tokens by step name; of a step that occurs twice, the first.
        truncated: Steps that were closed by force.
        ids: Every token of the chain, markers included.
        valid: Whether the steps come in order, each closed, none twice, with nothing between them.
    """

    def __init__(
        self, vocabulary: StepVocabulary, stop_ids: frozenset[int], turn_end: int, must_close: MustClose | None
    ) -> None:
        self.vocabulary = vocabulary
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
        kind = self.vocabulary.kinds.get(token, 0)
        if token in self.stop_ids and not kind:
            return False
        if token == self.turn_end and not self._open and self.vocabulary.answer in self.texts:
            return False
        step, open_after = advance(self._open, kind)
        if kind > 0:
            self.valid &= not self._open and kind > self._last
            self._close(forced=True)
            self._last, self._text = max(kind, self._last), []
        elif kind < 0:
            self.valid &= -kind == step
            if not open_after:
                self._close(forced=False)
        elif step:
            self._text.append(token)
        else:
            self.valid = False
        self._open = open_after
        self.ids.append(token)
        return True

    def end(self) -> None:
        """Take the end of the tokens: a step that is still open was never closed."""
        if self._open:
            self.valid = False
            self._close(forced=True)

    def _close(self, forced: bool) -> None:
        if not self._open:
            return
        name = self.vocabulary.steps[self._open - 1]
        forced = forced or (self.must_close is not None and self.must_close(self._open, len(self._text), len(self.ids)))
        if name in self.texts:
            self.valid = False
        else:
            self.texts[name] = self._text
            if forced:
                self.truncated.append(name)
        self._open = 0
