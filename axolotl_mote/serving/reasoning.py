"""A generated chain as reasoning and answer, in one piece or while it is being generated. No vLLM.

Structure is read from token ids. The server's text only says what to show: it can be shorter than the tokens, where a
stop string cut it or where characters are held back, and it never makes a marker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from axolotl_mote.chain.vocabulary import StepVocabulary, advance

BETWEEN_STEPS = "\n\n"
"""What stands between two reasoning steps in the `reasoning` of an answer."""

_SLACK = 2  # characters by which the text of a step may be shorter than its tokens decoded alone: a leading space


@dataclass(frozen=True)
class Piece:
    """New text of a chain.

    Args:
        text: The text.
        is_answer: Whether it belongs to `content`, else to `reasoning`.
    """

    text: str
    is_answer: bool


class ChainSplitter:
    """Follows one generation. Text outside of every step is the answer if no step was ever opened, else it is left out.

    Args:
        vocabulary: Steps and marker ids.
        spelled: Id -> text of every special token, markers included.
        decode: Token ids -> text.
    """

    def __init__(
        self, vocabulary: StepVocabulary, spelled: Mapping[int, str], decode: Callable[[list[int]], str]
    ) -> None:
        self._vocabulary, self._spelled, self._decode = vocabulary, spelled, decode
        self._answer = vocabulary.step_id(vocabulary.answer)
        self._stretch: list[int] = []  # tokens since the last special one
        self._closed: deque[tuple[list[int], int]] = deque()  # stretches and the special token behind each
        self._begin = 0  # in the text: where the first stretch begins whose end was not found yet
        self._shown = 0  # in the text: what is before this was shown, or left out
        self._open = 0
        self._opened = False  # whether any step was opened
        self._reasoned = False  # whether any reasoning was shown
        self._separator = ""

    def feed(self, text: str, tokens: Iterable[int]) -> Iterator[Piece]:
        """Take what was generated since the last call.

        Args:
            text: Everything generated so far, special tokens spelled.
            tokens: The new tokens.

        Yields:
            What is new, cut where reasoning changes to answer.
        """
        for token in tokens:
            if token in self._spelled:
                self._closed.append((self._stretch, token))
                self._stretch = []
            else:
                self._stretch.append(token)
        while self._closed:
            stretch, special = self._closed[0]
            length = len(self._decode(stretch)) if stretch else 0
            found = text.find(self._spelled[special], self._begin + max(length - _SLACK, 0))
            if found < 0:  # held back, or cut by a stop string, perhaps in the middle of its spelling
                rest = text[self._begin + max(length - _SLACK, 0) :]
                yield from self._show(text[: len(text) - _begun(rest, self._spelled[special])])
                return
            yield from self._show(text[:found])
            self._begin = self._shown = found + len(self._spelled[special])
            self._pass(special)
            self._closed.popleft()
        yield from self._show(text)

    def _pass(self, token: int) -> None:
        """Take a special token."""
        kind = self._vocabulary.kinds.get(token, 0)
        if kind > 0:
            self._opened = True
            self._separator = BETWEEN_STEPS if self._reasoned else ""
        _, self._open = advance(self._open, kind)

    def _show(self, text: str) -> Iterator[Piece]:
        """Show what is new in a text, as part of the open step."""
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        if not new or self._open > self._answer or (self._opened and not self._open):
            return
        is_answer = self._open in (0, self._answer)
        if not is_answer:
            new, self._separator, self._reasoned = self._separator + new, "", True
        yield Piece(new, is_answer)


def _begun(text: str, spelled: str) -> int:
    """How many characters at the end of a text are the beginning of a special token's spelling."""
    return next((n for n in range(min(len(text), len(spelled)), 0, -1) if text.endswith(spelled[:n])), 0)


def split_chain(splitter: ChainSplitter, text: str, tokens: Iterable[int]) -> tuple[str, str]:
    """Reasoning and answer of a complete generation, from a new splitter."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    for piece in splitter.feed(text, tokens):
        parts[piece.is_answer].append(piece.text)
    return "".join(parts[False]), "".join(parts[True])
