"""Texts that want to be more than text: look-alikes of every control token, disguised, cut, glued together."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

from fuzz_kit import STEPS, STYLES, Dialect
from hypothesis import strategies as st

from axolotl_mote.chain.steps import markers

INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad\u034f"
FULLWIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
_WORDS = """system user assistant model <<SYS>> <</SYS>> [UNK] <unk> [PAD] <|pad|> [CLS] [SEP] <0x0A> ##s ▁ Ġ Ċ
    {{ }} {% %} {# #} {{messages}} {%endfor%} {%raw%} {{'<|response|>'}} <tool_response> </tool_response> <think>
    </think> < > | / <| |> </ [ ] ｜ ＜ ＞ ¦ ǀ 0 1 ﬁ ① ẞ İ Σς 漢 🙂 <br>"""
_INVISIBLE_WORDS = (
    *("\ue000", "\ue001", "\ue0000\ue001", "\ue0001\ue001", "\ue000٣\ue001", "0\ue001", "\ue0000", "\uf8ff"),
    *("\u0338", "\u0301", "e\u0301", "\u212b", "\U000e0001", "\U0010fffd", "\ufffd", "\u202e", "\u2066", "👩\u200d👧"),
    *("\x00", "\x1b[31m", "\x7f", "\x85", "\x1c", " ", "\n", "\r\n", "\r", "\t", "\u2028", "\u3000"),
)
WORDS = [*_WORDS.split(), *_INVISIBLE_WORDS]
_SPECIAL = sorted({token for style in STYLES.values() for token in (*style.special, *style.plain, *style.blocks)})


def _insert(text: str, place: int, what: str) -> str:
    place %= len(text) + 1
    return text[:place] + what + text[place:]


@st.composite
def disguised(draw: st.DrawFn, tokens: list[str]) -> str:
    """A control token, or something that a normalizer, a template or a concatenation could turn into one."""
    token = draw(st.sampled_from(tokens))
    place = draw(st.integers(0, 30))
    match draw(st.integers(0, 9)):
        case 0:
            return token.upper()
        case 1:
            return token.translate(FULLWIDTH)
        case 2:
            return unicodedata.normalize("NFKC", token)
        case 3:
            return _insert(token, place, draw(st.sampled_from(INVISIBLE)))
        case 4:
            return token[: place % len(token)]
        case 5:
            return token[place % len(token) :]
        case 6:
            return _insert(token, place, draw(st.sampled_from(tokens)))
        case 7:
            return _insert(token, place, draw(st.sampled_from(WORDS)))
        case _:
            return token


CHARACTERS = st.characters(exclude_categories=["Cs"])
"""Everything but halves of characters: no row with one reaches a tokenizer."""


@functools.cache
def hostile(dialect: Dialect | None = None, most: int = 7) -> st.SearchStrategy[str]:
    """A text that is not blank; the control tokens of the dialect come more often than those of others.

    Args:
        dialect: Whose control tokens.
        most: Parts of a text; only texts of 7 are now and then repeated until they are long.
    """
    style = STYLES[dialect.style] if dialect else None
    own = [*markers(dialect.codec.steps if dialect else STEPS)]
    own += [*style.special, *style.plain, *style.blocks] if style else []
    part = disguised(own) | disguised([*own, *_SPECIAL]) | st.sampled_from(WORDS) | st.text(CHARACTERS, max_size=3)
    text = st.lists(part, min_size=1, max_size=most).map("".join)
    ends = st.sampled_from(["", "", "", " ", "\n"])
    text = st.tuples(ends, text, ends).map("".join)
    long = st.tuples(text, st.integers(2, 60)).map(lambda pair: pair[0] * pair[1])
    return (st.one_of(text, text, text, long) if most == 7 else text).filter(str.strip)


@st.composite
def dialogues(draw: st.DrawFn, dialect: Dialect) -> list[dict[str, str]]:
    """A dialogue that ends in a user turn, its texts hostile. A token may be cut in two across neighboring turns."""
    count = draw(st.sampled_from([1, 1, 3]))
    roles = [("user", "assistant")[number % 2] for number in range(count)]
    if STYLES[dialect.style].system and draw(st.booleans()):
        roles.insert(0, "system")
    texts = [draw(hostile(dialect)) for _ in roles]
    if len(texts) > 1 and draw(st.booleans()):
        token = draw(st.sampled_from([*markers(STEPS), *STYLES[dialect.style].special]))
        place = draw(st.integers(1, len(token) - 1))
        texts[0], texts[1] = texts[0] + token[:place], token[place:] + texts[1]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


@st.composite
def chains(draw: st.DrawFn, dialect: Dialect, most: int = 7) -> dict[str, Any]:
    """The steps of a valid row."""
    reasoning = dialect.codec.vocabulary.reasoning[: draw(st.integers(0, 2))]
    row: dict[str, Any] = {step: draw(hostile(dialect, most)) for step in (*reasoning, dialect.codec.vocabulary.answer)}
    return row | {"check": draw(st.sampled_from([None, "safe", "unsafe"]))}
