"""Foreign text made harmless: quoted where a prompt shows it, its control tokens broken up, its encoding repaired.

The codec encodes markers and special tokens inside texts as ordinary text; this module is for text that goes to models
whose tokenizer we do not control, and for prompts that quote it.
"""

from __future__ import annotations

import re

# What chat templates mark turns with: <|im_end|>, <|/analysis|>, <｜User｜>, <s>, <end_of_turn>, [INST], <<SYS>>
CONTROL_TOKEN = re.compile(
    r"<[|｜][^<>\n]{1,40}[|｜]>"
    r"|</?(?:s|bos|eos|pad|unk|mask|end_of_turn|start_of_turn|end_of_text|endoftext)>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>",
    re.IGNORECASE,
)


def quote(text: str) -> str:
    """Put ``> `` before every line, whatever kind of line break the text uses: no content can escape from it."""
    return "\n".join(f"> {line}" for line in str(text).splitlines() or [""])


def neutralize(text: str) -> tuple[str, int]:
    """Break up control tokens so that no tokenizer reads them as such: ``<|im_end|>`` becomes ``< |im_end|>``.

    Returns:
        The text and how many tokens were broken up.
    """
    return CONTROL_TOKEN.subn(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: unpaired surrogates, which JSON can spell, become "?"."""
    return text.encode("utf-8", "replace").decode()
