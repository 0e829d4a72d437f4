"""Answers and questions as the judge reads them: cleaned text, sentences, words.

Cleaning makes equal what reads equal (curly apostrophes, zero-width characters, emphasis, contractions), takes out what
the answer only shows (code, quoted speech), and turns the usual refusals of ten further languages into English ones.
"""

from __future__ import annotations

import re
import unicodedata

_HEAD_LENGTH, _TAIL_LENGTH = 5000, 1500
_SIGNS = str.maketrans(dict.fromkeys("‘’ʼ`´′＇", "'") | dict.fromkeys("“”„‟«»″", '"'))

_REWRITES = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in [
        (r"^[ \t]*\*[ \t]", "- "),
        (r"[*_#]+", ""),
        (r"\bca(?:n'?t|n not)\b", "cannot"),
        (r"\bwon'?t\b", "will not"),
        (r"n't\b", " not"),
        (r"\bi'?m\b", "i am"),
        (r"\b(\w+)'re\b", r"\1 are"),
        (r"\b(it|that|there|what|who|how|he|she|here)'s\b", r"\1 is"),
        (r"\b(\w+)'ll\b", r"\1 will"),
        (r"\b(\w+)'ve\b", r"\1 have"),
        (r"\b(\w+)'d\b", r"\1 would"),
        (r"\bam (?:not able|unable|not allowed|not permitted)\b", "cannot"),
        (r"\bam not going to\b|\bdo not want to\b|\bam not willing to\b|\bam unwilling to\b", "will not"),
        # These say the opposite of what their words say.
        (r"\bcannot (?:stress|emphasi[sz]e|overstate|wait|help but|go wrong|imagine|thank)\b", "must"),
        (r"\bcannot recommend ([^.!?\n]{0,40}) enough\b", r"recommend \1"),
    ]
]

_FOREIGN = [
    (re.compile(pattern), replacement)
    for replacement, pattern in {
        " i am sorry, but ": (
            r"\blo siento\b|\bje suis désolée?\b|\bes tut mir leid\b|\bmi dispiace\b|\bsinto muito\b|\bdesculpe\b|"
            r"\bизвините\b|\bк сожалению\b|\bhet spijt me\b|\bprzepraszam\b|"
            r"抱歉|对不起|對不起|申し訳(?:ありません|ございません)|"
            r"すみません|죄송(?:합니다|하지만)|عذرا"
        ),
        " i cannot help ": (
            r"\bno puedo (?:\w+ )?(?:ayudar\w*|proporcionar\w*|responder|ofrecer\w*|cumplir|asistir\w*|dar\w*)|"
            r"\bne (?:peux|suis) pas (?:\w+ )?(?:aider|fournir|répondre|donner|en mesure)|"
            r"\bkann (?:\w+ ){0,4}?nicht (?:\w+ )?(?:helfen|weiterhelfen|beantworten|bereitstellen|erfüllen|geben)|"
            r"\bnon posso (?:\w+ )?(?:aiutar\w*|fornir\w*|risponder\w*)|\bnão posso (?:\w+ )?(?:ajudar|fornecer|"
            r"responder)|"
            r"\bне могу (?:\w+ )?(?:помочь|предоставить|ответить|выполнить|дать)|"
            r"\bkan (?:\w+ ){0,3}?niet (?:\w+ )?(?:helpen|beantwoorden|geven)|\bnie mogę (?:\w+ )?(?:pomóc|podać|"
            r"odpowiedzieć)|"
            r"(?:无法|無法|不能)(?:为您|为你)?(?:提供|帮助|幫助|协助|協助|回答|满足)|"
            r"(?:お手伝い|お答え|提供|対応|お応え)(?:する)?(?:こと)?(?:は|が)?でき(?:ません|かねます)|"
            r"(?:도와\s?드릴|도울|제공할|답변할) 수 없|لا (?:أستطيع|يمكنني)"
        ),
    }.items()
]

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_QUOTE = re.compile(r'"[^"\n]*"')
_SHOWN_LINE = re.compile(r"^>.*$", re.MULTILINE)
_QUOTED_WORDS = 4
_BREAK = re.compile(r"(?<=[.!?:])[\"')\]]*\s+|(?<=[。！？])|\n+")
_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")
_SUFFIXES = ("ing", "edly", "ed", "es", "s", "ly", "ion", "e")


def clean(text: str) -> str:
    """Lower case, plain signs, no code, quoted speech, emphasis or contractions.

    Quotations of four words and more become the word ``quoted``; an answer that is nothing else stays as it is. Long
    texts are read at both ends alone.

    Example:
        >>> clean("I can’t help with **that**.")
        'i cannot help with that.'
        >>> clean('She said: "I cannot help you with that."')
        'she said: quoted'
    """
    text = unicodedata.normalize("NFKC", _ends(text)).translate(_SIGNS).casefold()
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c) not in ("Cf", "Cc", "Cs"))
    own = _QUOTE.sub(_shortened, _SHOWN_LINE.sub(" ", _CODE.sub(" codeblock ", text)))
    if set(words(own)) - {"quoted", "codeblock"}:
        text = own
    for pattern, replacement in (*_REWRITES, *_FOREIGN):
        text = pattern.sub(replacement, text)
    return text.strip()


def _ends(text: str) -> str:
    if len(text) <= _HEAD_LENGTH + _TAIL_LENGTH:
        return text
    return f"{text[:_HEAD_LENGTH]}\n{text[-_TAIL_LENGTH:]}"


def _shortened(quote: re.Match[str]) -> str:
    return " quoted " if len(quote[0].split()) >= _QUOTED_WORDS else quote[0]


def sentences(cleaned: str) -> list[str]:
    """Sentences and list items of a cleaned text, without those that hold no word."""
    parts = (" ".join(part.split()) for part in _BREAK.split(cleaned))
    return [part for part in parts if re.search(r"[^\W\d_]", part)] or [" ".join(cleaned.split())]


def words(text: str) -> list[str]:
    """Words and numbers, in order."""
    return _WORD.findall(text)


def stem(word: str) -> str:
    """A word without its commonest English endings: ``killing`` and ``kills`` are ``kill``."""
    word = word.removesuffix("'s").removesuffix("'")
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 4:
            return word[: -len(suffix)]
    return word
