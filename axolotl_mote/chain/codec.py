"""`ChainCodec`: dialogues and chains to token ids, and back. The safety boundary for foreign text.

The text trained on is the chat template of `messages` with the generation prompt, then each present step as marker,
text, end marker, then the template's end-of-turn token. User and step texts can never produce a marker or any other
special token, in training and at inference alike. Needs a tokenizer; imports no model.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from axolotl_mote.chain.parsing import ChainParser, MustClose
from axolotl_mote.chain.quoting import CONTROL_TOKEN
from axolotl_mote.chain.result import Chain
from axolotl_mote.chain.steps import CHECK, IGNORE_INDEX, end_marker, markers, start_marker, validate_steps
from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.files import installed_versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")

# Private-use characters that stand for a guarded string while the template is rendered: OPEN, its number, CLOSE.
_OPEN, _CLOSE = "\ue000", "\ue001"
_STAND_IN = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_BETWEEN_SPACES = re.compile(r"(?s)\S(?:.*\S)?")  # templates trim texts
_START = re.compile(r"<\|([a-z][a-z0-9_]*)\|>\Z")

_ENCODING = threading.Lock()
"""Held around every encoding: ``split_special_tokens`` is a switch of the one backend that all users of a tokenizer
share, so that another thread could turn the guarded text of a question into markers."""


class ChainCodec:
    """Encodes questions and chains, and parses generated chains.

    What depends on the tokenizer alone (guard pattern, marker ids, end of turn) is computed once, on first use.

    Args:
        tokenizer: A tokenizer with a chat template; for everything about chains it must know the markers.
        steps: Step names in order; empty for a model without steps, of which only dialogues are encoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, steps: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.steps = tuple(steps)

    def __getstate__(self) -> dict[str, Any]:
        """What pickles, and so the fingerprint of a mapped data set, depend on: not on what was computed already.

        Chains that another version of this package has encoded are not reused.
        """
        return {"tokenizer": self.tokenizer, "steps": self.steps, "version": installed_versions(["axolotl-mote"])}

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> ChainCodec:
        """The codec of a tokenizer that knows markers; the steps are read from them, in the order of their ids.

        Raises:
            ValueError: If it does not know any.
        """
        decoder = tokenizer.added_tokens_decoder
        added = [str(token) for _, token in sorted(decoder.items())]
        names = [m.group(1) for text in added if (m := _START.match(text)) and end_marker(m.group(1)) in added]
        plain = cls(tokenizer)
        names = [name for name in names if not any(map(plain._other_use, markers([name])))]
        if not names:
            raise ValueError(
                "model must carry a MoTE adapter, or the tokenizer must hold step markers such as <|response|>; found "
                "neither. Load the adapter with load_mote, or use the tokenizer saved with it."
            )
        return cls(tokenizer, validate_steps(names))

    # --- what depends on the tokenizer alone ------------------------------------------------------------------------

    @cached_property
    def vocabulary(self) -> StepVocabulary:
        """The steps and the ids of their markers.

        Raises:
            ValueError: If the tokenizer splits a marker or does not know it as a special token, or if the marker also
                is another token of the tokenizer or the chat template: it would open a step in every question.
        """
        for step in self.steps:
            for marker in markers([step]):
                if use := self._other_use(marker):
                    raise ValueError(
                        f"mote.steps must not name a token that has another use; got {step!r}, but {marker} {use}. "
                        "Rename the step; an adapter trained with this name must be trained again."
                    )
        ids = []
        for marker in markers(self.steps):
            encoded = self._encode(marker)
            known = self.tokenizer.added_tokens_decoder.get(encoded[-1]) if encoded else None
            if len(encoded) != 1 or known is None or not known.special:
                raise ValueError(
                    f"The tokenizer must know {marker!r} as one special token; got {encoded}. Add the plugin "
                    "axolotl_mote.MotePlugin, or the markers to special_tokens.additional_special_tokens."
                )
            ids.append(int(encoded[0]))
        return StepVocabulary.from_marker_ids(self.steps, ids)

    def _other_use(self, marker: str) -> str | None:
        """What else a marker is to the tokenizer; None if nothing else uses it."""
        for name, token in self.tokenizer.special_tokens_map.items():
            if token == marker:
                return f"is the tokenizer's {name}"
        return "is in the chat template" if marker in self._template_text else None

    @cached_property
    def _template_text(self) -> str:
        """What the chat template writes around turns: its source, for every branch, and what it puts together."""
        if not self.tokenizer.chat_template:
            return ""
        texts = [str(self.tokenizer.chat_template)]
        question = {"role": "user", "content": _OPEN}
        answer, system = question | {"role": "assistant"}, question | {"role": "system"}
        for dialogue in ([question], [question, answer], [system, question]):
            for prompt in (True, False):
                with suppress(ValueError):  # some take no system turn
                    texts.append(self._render(dialogue, add_generation_prompt=prompt))
        return "\n".join(texts)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Every id that may not stand inside a step: markers, end of turn, padding and all other special tokens."""
        return frozenset(self._special_tokens) | frozenset(self.vocabulary.kinds)

    @cached_property
    def _special_tokens(self) -> dict[int, str]:
        """The tokenizer's special tokens: added ones marked as special, and named ones such as padding."""
        added = self.tokenizer.added_tokens_decoder.items()
        named = zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True)
        return {token: content.content for token, content in added if content.special} | dict(named)

    @cached_property
    def _control_tokens(self) -> dict[int, str]:
        """The special tokens, and what marks turns without being special: DeepSeek's <｜User｜>."""
        added = self.tokenizer.added_tokens_decoder.items()
        roles = {token: content.content for token, content in added if CONTROL_TOKEN.fullmatch(content.content)}
        return self._special_tokens | roles

    @cached_property
    def _control(self) -> frozenset[int]:
        """Ids that no text may produce: control tokens, but for one that only stands for what cannot be spelled."""
        unknown = self.tokenizer.unk_token
        uses = [name for name, token in self.tokenizer.special_tokens_map.items() if token == unknown]
        if unknown is None or len(uses) > 1 or unknown in self._template_text:
            return frozenset(self._control_tokens)
        return frozenset(self._control_tokens) - {self.tokenizer.unk_token_id}

    @cached_property
    def end_of_turn(self) -> tuple[int, ...]:
        """What the chat template puts between an assistant's text and the next turn, up to its last special token.

        Read off the template: only what it writes both at the end of a dialogue and before a user turn belongs to the
        answer. Some templates open the next turn unasked; a turn opens with the token that opens the dialogue.

        Raises:
            ValueError: If the template refuses an answered question or leaves out its text, or nothing ends it.
        """
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _OPEN}]
        pieces = self._render(turns).split(_OPEN)
        if len(pieces) == 1:
            raise ValueError(
                "chat_template must write the text of an assistant's turn; it left it out. Use a template that takes "
                "`content` as text."
            )
        head, last = self._encode(pieces[0]), self._encode(pieces[-1])
        try:
            followed = self._render([*turns, {"role": "user", "content": _CLOSE}])
        except ValueError:  # a template for single answers
            shared = last
        else:
            pairs = zip(last, self._encode(followed.split(_OPEN)[-1].split(_CLOSE)[0]), strict=False)
            shared = [ours for ours, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        special = self._special_tokens.keys() & self._control  # not the unknown token, which may stand for a line break
        opening = next((t for t in head if t in special and t != self.tokenizer.bos_token_id), None)
        ends = [
            position
            for position, token in enumerate(takewhile(lambda token: token != opening, shared))
            if token in special
        ]
        if not ends:  # the template ends dialogues only, or with the token that opens them
            ends = [position for position, token in enumerate(last) if token in special][:1]
        if not ends and self.tokenizer.eos_token_id is None:
            raise ValueError(
                "an answer must end with a special token; the chat template writes none behind it, and the tokenizer "
                "has no eos_token. Set special_tokens: eos_token."
            )
        return tuple(last[: ends[-1] + 1]) if ends else (self.tokenizer.eos_token_id,)

    def _render(self, messages: Sequence[Mapping[str, str]], **options: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
        except TemplateError as error:
            raise ValueError(f"messages must suit the chat template; it says: {error} Change the turns.") from error

    @property
    def stop_id(self) -> int:
        """The token that ends a turn: the last of ``end_of_turn``.

        Some templates put ordinary text, a space or a line break, between the answer and it.
        """
        return int(self.end_of_turn[-1])

    @property
    def pad_id(self) -> int:
        """Padding; masked, so any id will do."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.stop_id)

    def marker_words(self) -> list[list[int]]:
        """Ids of words that describe each marker, from whose mean its row starts; in the order of the markers."""
        verbs = ("begin", "end")
        return [self.encode_text(f"{verb} {step.replace('_', ' ')}") for step in self.steps for verb in verbs]

    @cached_property
    def _guarded(self) -> re.Pattern[str]:
        """Everything that must not be recognized inside a text: markers, control tokens, and our own stand-in."""
        control = {*self._control_tokens.values(), *markers(self.steps)}
        longest_first = sorted(filter(None, control), key=lambda text: (-len(text), text))
        return re.compile("|".join([*map(re.escape, longest_first), _OPEN]))

    def _normalized(self, text: str) -> str:
        """Text as the tokenizer sees it when it looks for special tokens."""
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return text if normalizer is None else str(normalizer.normalize_str(text))

    # --- encoding ---------------------------------------------------------------------------------------------------

    def encode_text(self, text: str) -> list[int]:
        """Encode text as ordinary text: no control token is recognized in it and none is added.

        Raises:
            ValueError: If the token for what the tokenizer cannot spell has another use, such as padding.
        """
        ids = self._encode(text, split_special_tokens=True)
        if self._control.isdisjoint(ids):
            return ids
        # Added tokens that are not special are found all the same, and so are pieces of Unigram models such as </s>.
        pieces = re.split(rf"(?s)(?<=(?=(?:{self._guarded.pattern})).)", text)
        return [token for piece in pieces for token in self._encode_apart(piece)]

    def _encode_apart(self, text: str) -> list[int]:
        """Encode text, cut into halves until no control token comes out."""
        ids = self._encode(text, split_special_tokens=True)
        if self._control.isdisjoint(ids):
            return ids
        if len(text) == 1:
            raise ValueError(
                f"the tokenizer must spell every character, or have an unk_token without another use; it encodes "
                f"{text!r} as {self.tokenizer.decode(ids)}. Set unk_token, or leave the character out."
            )
        middle = len(text) // 2
        return self._encode_apart(text[:middle]) + self._encode_apart(text[middle:])

    def _encode(self, text: str, **options: bool) -> list[int]:
        with _ENCODING:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return ids

    def encode_question(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Encode a dialogue with its generation prompt; what looks like a control token in a message stays text.

        Args:
            messages: The dialogue, ending in a user turn.

        Returns:
            Token ids, as ``apply_chat_template`` gives them for messages without special strings.

        Raises:
            ValueError: If a role is unknown (templates print roles as they are), or the chat template refuses a turn.
        """
        for message in messages:
            if message["role"] not in ROLES:
                raise ValueError(f"role must be one of {ROLES}; got {message['role']!r}. Rename it.")
        pieces = self._pieces(messages)
        ids = self._encode_pieces(pieces)
        # Texts that the template puts side by side, or beside signs of its own, can make a control token together.
        apart = self._pieces(messages, apart=True)
        if self._controls(ids) != self._controls(self._encode_pieces([p for p in apart if not p[1]])):
            ids = self._encode_pieces(apart)
        return ids

    def _pieces(self, messages: Sequence[Mapping[str, str]], apart: bool = False) -> list[tuple[str, bool]]:
        """The rendered dialogue in pieces, each with whether it must be encoded as ordinary text.

        Args:
            messages: The dialogue.
            apart: Make every text a piece of its own; else only what would be recognized in it.
        """
        hostile: list[str] = []

        def stand_in(match: re.Match[str]) -> str:
            hostile.append(match.group())
            return f"{_OPEN}{len(hostile) - 1}{_CLOSE}"

        def guard(text: str) -> str:
            # A normalizer may turn a look-alike into a special token: such a text is encoded as text from end to end.
            pieces = self._guarded.split(text)
            whole = apart or any(self._guarded.search(self._normalized(piece)) for piece in pieces)
            return (_BETWEEN_SPACES if whole else self._guarded).sub(stand_in, text)

        # The template never sees what the stand-ins replace; each is then encoded as ordinary text. A special token
        # would split the text at the same places, so all other text is encoded as usual.
        # Further fields of a turn are left out: some templates print them.
        safe = [{"role": message["role"], "content": guard(message["content"])} for message in messages]
        rendered = _STAND_IN.split(self._render(safe, add_generation_prompt=True))
        return [(hostile[int(piece)], True) if n % 2 else (piece, False) for n, piece in enumerate(rendered)]

    def _encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        encoded = (self.encode_text(text) if foreign else self._encode(text) for text, foreign in pieces if text)
        return [token for ids in encoded for token in ids]

    def _controls(self, ids: Iterable[int]) -> list[int]:
        return [token for token in ids if token in self._control]

    def encode_chain(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """Encode one valid chain row.

        Args:
            row: A row with `messages` and a column per step; absent, null and blank steps are left out.

        Returns:
            `input_ids`, `attention_mask` and `labels` (-100 on the question), lists of equal length.
        """
        ids_of = dict(zip(markers(self.steps), self.vocabulary.marker_ids, strict=True))
        question = self.encode_question(row["messages"])
        chain: list[int] = []
        for step in self.steps:
            text = row.get(step)
            if text is not None and text.strip():
                chain += [ids_of[start_marker(step)], *self.encode_text(text.strip()), ids_of[end_marker(step)]]
        chain += self.end_of_turn
        input_ids = question + chain
        return {
            "input_ids": input_ids,
            "attention_mask": [1] * len(input_ids),
            "labels": [IGNORE_INDEX] * len(question) + chain,
        }

    # --- decoding ---------------------------------------------------------------------------------------------------

    def stretches(self, ids: Sequence[int]) -> list[tuple[int, str]]:
        """The text of token ids, cut where the step changes: (step id, text) of each stretch.

        A character may be spread over several tokens, so text is decoded a whole stretch at a time.
        """
        pairs = zip(self.vocabulary.step_ids(ids), ids, strict=True)
        return [
            (step, str(self.tokenizer.decode([token for _, token in stretch])))
            for step, stretch in groupby(pairs, key=lambda pair: pair[0])
        ]

    def parse(self, ids: Iterable[int], *, must_close: MustClose | None = None, expect_check: bool = False) -> Chain:
        """Read a chain off generated token ids.

        Args:
            ids: Tokens after the question. Parsing stops at end of turn or padding, and where the template's end of
                turn begins after the answer.
            must_close: Tells whether a step was closed by force; see ``parsing.MustClose``.
            expect_check: Whether the chain is only finished with its check step.

        Returns:
            The chain. An invalid one is returned as far as it can be read, with ``valid`` and ``finished`` False.
        """
        vocabulary = self.vocabulary
        parser = ChainParser(vocabulary, frozenset({self.stop_id, self.pad_id}), self.end_of_turn[0], must_close)
        for token in ids:
            if not parser.read(int(token)):
                break
        parser.end()
        texts = {name: self.tokenizer.decode(text, skip_special_tokens=False) for name, text in parser.texts.items()}
        answer = vocabulary.answer
        wanted = {answer, CHECK} if expect_check else {answer}
        valid = parser.valid and answer in texts
        return Chain(
            texts=texts,
            token_counts={name: len(text) for name, text in parser.texts.items()},
            finished=valid and wanted <= set(texts) and answer not in parser.truncated and bool(texts[answer].strip()),
            truncated=tuple(parser.truncated),
            valid=valid,
            vocabulary=vocabulary,
            token_ids=tuple(parser.ids),
            spent=len(parser.ids),
        )
