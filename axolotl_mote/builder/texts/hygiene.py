"""Generated text: cleaned of reasoning and control tokens, and checked for defects."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from axolotl_mote.builder.settings import Hygiene
from axolotl_mote.chain.quoting import encodable, neutralize, strip_control_tokens

# <think>, <thinking>, <seed:think> (Seed-OSS), [THINK] (Magistral), Cohere's, Kimi-VL's and Gemma 4's spelling
_OPENS = r"(?:<(?:seed:)?think(?:ing)?>|\[THINK\]|<\|START_THINKING\|>|◁think▷|<\|channel>)"
_CLOSES = r"(?:</(?:seed:)?think(?:ing)?>|\[/THINK\]|<\|END_THINKING\|>|◁/think▷|<channel\|>)"
_THINKING = re.compile(rf"\A(?:.*{_CLOSES})?(?:\s*{_OPENS}.*)?", re.DOTALL)

_CANNOT = r"(?:can'?t|cannot|can not|won'?t|am unable|am not able)\b"
_REFUSALS = (
    rf"(?:i'?m|i am) (?:very |really |so |truly )?sorry,?(?: but)?(?: as an? [\w ]+,)? i {_CANNOT}",
    rf"(?:sorry|apologies|i apologi[sz]e)[,.]? (?:but )?i {_CANNOT}",
    rf"i {_CANNOT}(?: to)? (?:assist|help|comply|fulfil|provide|answer|do that|support)",
    rf"as an? (?:ai|artificial intelligence|language model|large language model)[\w ]*, i (?:{_CANNOT}|don'?t\b)",
)


def without_thinking(text: str) -> str:
    """Generated text without the reasoning before it.

    The prompt may have opened ``<think>`` already, so everything up to the last ``</think>`` is reasoning. If a later
    ``<think>`` is never closed, the rest is reasoning too. Other models' spellings count as well: ``[THINK]`` and such.
    """
    return _THINKING.sub("", text, count=1)


def clean(text: str, control_tokens: Sequence[str] = ()) -> tuple[str, int]:
    """Generated text ready to be stored: valid UTF-8, no reasoning, no control tokens at its ends or inside.

    Args:
        text: What the model wrote.
        control_tokens: More control tokens than those known; see ``chain.quoting.neutralize``.

    Returns:
        The text and how many control tokens were broken up inside it.
    """
    return neutralize(strip_control_tokens(without_thinking(encodable(text)), control_tokens), control_tokens)


def defect(text: str, finish: str, rules: Hygiene) -> str | None:
    """Why a text cannot be used, or None.

    Args:
        text: The cleaned text.
        finish: How generation ended; see ``clients.calls.Completion``.
        rules: Thresholds.

    Returns:
        filtered, refused_by_server, empty, repeated, truncated, refusal, or None.
    """
    if finish in ("filtered", "refused"):
        return "filtered" if finish == "filtered" else "refused_by_server"
    words = text.split()
    if len(words) < rules.min_words or not any(map(str.isalnum, text)):
        return "empty"
    if is_repeated(text, rules):
        return "repeated"
    if finish == "length":
        return "truncated"
    if len(words) <= rules.refusal_max_words and is_refusal(text, rules):
        return "refusal"
    return None


def is_repeated(text: str, rules: Hygiene) -> bool:
    """True if a line occurs too often or too few of the word 4-grams are distinct."""
    lines = Counter(line.strip() for line in text.splitlines() if line.strip())
    if lines and max(lines.values()) > rules.max_line_repeats:
        return True
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    # Fewer than 20 4-grams say little: a short list may repeat its pattern on purpose.
    return len(grams) >= 20 and len(set(grams)) / len(grams) < rules.min_distinct_ngrams


def is_refusal(text: str, rules: Hygiene) -> bool:
    """True if the text begins with a stock refusal."""
    opening = text.replace("’", "'").lstrip("\"'*# \n").lower()
    patterns = (*_REFUSALS, *rules.refusal_patterns)
    return any(re.match(pattern, opening, re.IGNORECASE) for pattern in patterns)
