"""Show a chain while it is being generated: token ids in, pieces of text per step out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.generation.streamers import BaseStreamer

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.vocabulary import advance

_INCOMPLETE = "\ufffd"


class StepStreamer(BaseStreamer):
    """Calls ``on_text(step, piece)`` for every new piece of text.

    It follows one dialogue: a batch of several rows raises ValueError, and transformers refuses it with beam search.

    Pieces are cut at whole characters: a character that takes several tokens is held back until it is complete.

    Args:
        codec: Knows the steps and decodes their text.
        on_text: Receives the step's name and the new text; an empty piece opens a step.
    """

    def __init__(self, codec: ChainCodec, on_text: Callable[[str, str], None]) -> None:
        self.tokenizer = codec.tokenizer
        self.kinds = codec.vocabulary.kinds
        self.names = codec.steps
        self.on_text = on_text
        self._prompt_seen = False
        self._open = 0
        self._text: list[int] = []
        self._shown = 0

    def put(self, value: Any) -> None:
        """Take the prompt (first call, ignored) or newly generated token ids.

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
            self._take(token)

    def _take(self, token: int) -> None:
        kind = self.kinds.get(token, 0)
        step, open_after = advance(self._open, kind)
        if kind > 0 or open_after != self._open:  # the open step ends here
            self._flush(final=True)
            self._text, self._shown = [], 0
        self._open = open_after
        if kind > 0:
            self.on_text(self.names[step - 1], "")
        elif kind == 0 and step:
            self._text.append(token)
            self._flush(final=False)

    def end(self) -> None:
        """Release what was held back and be ready for the next generation."""
        self._flush(final=True)
        self._prompt_seen, self._open, self._text, self._shown = False, 0, [], 0

    def _flush(self, final: bool) -> None:
        if not self._open or not self._text:
            return
        text = self.tokenizer.decode(self._text, skip_special_tokens=False)
        if not final and text.endswith(_INCOMPLETE):
            return
        if len(text) > self._shown:
            self.on_text(self.names[self._open - 1], text[self._shown :])
            self._shown = len(text)
