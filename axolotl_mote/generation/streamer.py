"""Show a chain while it is being generated: token ids in, pieces of text per step out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.generation.streamers import BaseStreamer

from axolotl_mote.generation.vocabulary import StepVocabulary

_INCOMPLETE = "\ufffd"


class StepStreamer(BaseStreamer):
    """Calls ``on_text(step, piece)`` for every new piece of text.

    It shows one dialogue at a time: several rows raise ValueError, and transformers refuses it with beam search.

    Pieces are cut at whole characters: a character that takes several tokens is held back until it is complete.

    Args:
        tokenizer: Decodes the text.
        vocabulary: The steps and their markers.
        on_text: Receives the step's name and the new text; an empty piece opens a step.
    """

    def __init__(self, tokenizer: Any, vocabulary: StepVocabulary, on_text: Callable[[str, str], None]) -> None:
        self.tokenizer = tokenizer
        self.kinds = vocabulary.kinds()
        self.names = vocabulary.steps
        self.on_text = on_text
        self._prompt_seen = False
        self._open = 0
        self._text: list[int] = []
        self._shown = 0

    def put(self, value: Any) -> None:
        """Take the prompt (first call, skipped) or newly generated token ids.

        Raises:
            ValueError: If a batch of several rows is generated.
        """
        if value.dim() > 1 and len(value) > 1:
            raise ValueError(
                f"streamer must follow one dialogue; got a batch of {len(value)}. Pass one dialogue, or batch_size=1."
            )
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            kind = self.kinds.get(token, 0)
            if kind:
                self._flush(final=True)
                self._open, self._text, self._shown = max(kind, 0), [], 0
                if kind > 0:
                    self.on_text(self.names[kind - 1], "")
            elif self._open:
                self._text.append(token)
                self._flush(final=False)

    def end(self) -> None:
        """Release what was held back and be ready for the next generation."""
        self._flush(final=True)
        self._prompt_seen, self._open = False, 0

    def _flush(self, final: bool) -> None:
        if not self._open or not self._text:
            return
        text = self.tokenizer.decode(self._text, skip_special_tokens=False)
        if not final and text.endswith(_INCOMPLETE):
            return
        if len(text) > self._shown:
            self.on_text(self.names[self._open - 1], text[self._shown :])
            self._shown = len(text)
