"""Foreign text made harmless: quoted where a prompt shows it, its control tokens broken up, its encoding repaired.

The codec encodes markers and special tokens inside texts as ordinary text; this module is for text that goes to models
whose tokenizer we do not control, and for prompts that quote it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

# What chat templates of the day mark turns and sequences with. Tokenizers match them exactly; only the oldest families
# are matched in any case. Words that ordinary text uses as well (<think>, <tool_call>, <image>, [ARGS]) are left alone.
CONTROL_TOKEN = re.compile(
    r"<[|｜][^<>\n]{1,40}[|｜]>"  # <|im_end|>, <|/analysis|>, <｜User｜>: ChatML, Llama 3 and 4, DeepSeek, Phi, Cohere
    r"""|<\|["\w/:.-]{1,40}>|<["\w/:.-]{1,40}\|>"""  # <|turn>, <turn|>, <|"|>: Gemma 4
    r"|\[\|/?[A-Za-z_]{2,40}\|\]"  # [|user|]: EXAONE
    r"|(?i:</?(?:s|bos|eos|pad|unk|mask|sep|cls|end_of_turn|start_of_turn|end_of_text|endoftext)>)"
    r"|</?(?:start|end|begin|beginning)_of_\w{1,30}>|<(?:start|end)_function_\w{1,30}>"  # Gemma, MiniMax
    r"|</?(?:seed|minimax):\w{1,40}>"  # <seed:bos>: Seed-OSS
    r"|\]~!?b[\[\]]|\[e~\[|\]<\]\w[\w ]{0,30}\[>\["  # ]~b]user, ]~!b[, [e~[: MiniMax
    r"|\[[gs]?MASK\]|<[se]op>|<eo[adh]>"  # [gMASK]<sop>: GLM; <eoh>: InternLM
    r"|(?i:\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])|<</?SYS>>"  # Mistral, Llama 2
    r"|\[/?(?:THINK|TOOL_CONTENT|CALL_ID|MODEL_SETTINGS|IMG_BREAK|IMG_END|BEGIN_AUDIO)\]"  # [THINK]: Mistral, Magistral
    r"|\[(?:BOS|EOS|EOT|PAD|UNK|CLS|SEP|start_header_id|end_header_id)\]"  # Kimi, EXAONE, BERT
    r"|<(?:unused|reserved_|extra_id_|SPECIAL_|TOKENS_UNUSED_)\d{1,6}>"  # <unused1>: Gemma, Baichuan, Nemotron
    r"|\[(?:unused|UNUSED_TOKEN_)\d{1,6}\]"  # Pangu, BERT, InternLM
    r"|<(?:BOS|EOS|EOP|MASK)_TOKEN>|<_[a-z]{2,20}>"  # Cohere; TeleChat
    r"|<role>(?=SYSTEM|HUMAN|ASSISTANT|OBSERVATION)"  # Ling
)


def quote(text: str) -> str:
    """Put ``> `` before every line, whatever kind of line break the text uses: no content can escape from it."""
    return "\n".join(f"> {line}" for line in str(text).splitlines() or [""])


def neutralize(text: str, further: Sequence[str] = ()) -> tuple[str, int]:
    """Break up control tokens so that no tokenizer reads them as such: ``<|im_end|>`` becomes ``< |im_end|>``.

    Tokens that overlap or contain another are broken up one by one.

    Args:
        text: The text.
        further: More control tokens, as their tokenizer spells them, of two or more characters.

    Returns:
        The text and how many tokens were broken up.
    """
    return _starts(tuple(further)).subn(r"\g<0> ", text)


def strip_control_tokens(text: str, further: Sequence[str] = ()) -> str:
    """The text without the control tokens and the white space at its ends.

    Args:
        text: The text.
        further: More control tokens; see ``neutralize``.
    """
    spans = [match.span() for match in _tokens(tuple(further)).finditer(text)]
    start, end = 0, len(text)
    for first, last in spans:
        if text[start:first].strip():
            break
        start = last
    for first, last in reversed(spans):
        if first < start or text[last:end].strip():
            break
        end = first
    return text[start:end].strip()


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: unpaired surrogates, which JSON can spell, become "?"."""
    return text.encode("utf-8", "replace").decode()


@lru_cache(maxsize=16)
def _tokens(further: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join([*map(re.escape, further), CONTROL_TOKEN.pattern]))


@lru_cache(maxsize=16)
def _starts(further: tuple[str, ...]) -> re.Pattern[str]:
    """The first character of each control token."""
    return re.compile(rf"(?=(?:{_tokens(further).pattern})).", re.DOTALL)
