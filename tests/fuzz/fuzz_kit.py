"""Tiny tokenizers of every kind, trained here and now, and chat templates of every kind.

A *dialect* is a tokenizer with a chat template and the markers, as a user's base model has them. `Dialect.control` are
the tokens that give a dialogue its form, `Dialect.canonical` says what the tokenizer itself does to a text.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import markers

STEPS = ("analysis", "guidance", "response", "check")

_ALWAYS = {
    "database": None,  # nothing is left in the repository
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
}
settings.register_profile("fuzz-ci", derandomize=True, **_ALWAYS)
settings.register_profile("fuzz-deep", print_blob=True, **_ALWAYS)
PROFILE = os.environ.get("FUZZ_PROFILE", "fuzz-ci")
DEEPER = {"fuzz-ci": 1, "fuzz-deep": 20}[PROFILE]


def cases(number: int) -> Callable[[Any], Any]:
    """How many examples a property gets: the number in CI, a multiple of it under the profile fuzz-deep."""
    return settings(settings.get_profile(PROFILE), max_examples=number * DEEPER)


# --- tokenizers -----------------------------------------------------------------------------------------------------

CORPUS = [
    "The quick brown fox asks: how do I kill a Python process? Name the signal, then say so.",
    "It is harmless. system user assistant model analysis guidance response check safe unsafe think",
    "<s> </s> [INST] <|im_start|> <|response|> </think> {{ x }} {% if y %} 0 1 2 3 Übung, é, 漢字, Ω",
] * 3
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # in the style of Tekken
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(pre_tokenizer: Any, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_bpe() -> Tokenizer:
    """GPT-2, Qwen, SmolLM2."""
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def tekken() -> Tokenizer:
    """Mistral's Tekken and Llama 3: words are cut by a regular expression, whole words are looked up first."""
    cut = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _byte_level(pre_tokenizers.Sequence([cut, bytes_]), ignore_merges=True)


def sentencepiece_bpe(byte_fallback: bool = True) -> Tokenizer:
    """Llama 2 as transformers converts it: a normalizer writes the space signs."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *_BYTES]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    trained = json.loads(tokenizer.to_str())
    trained["model"] |= {"byte_fallback": byte_fallback, "fuse_unk": True}
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] not in _BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def sentencepiece_unigram() -> Tokenizer:
    """llm-jp and XGLM: control tokens are pieces of the model too, and the normalizer is NFKC."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((byte, -10.0) for byte in _BYTES)], 0, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT, uncased: lower case, no accents, no control characters, one token for what it does not know."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_normalizer(*parts: Any) -> Callable[[], Tokenizer]:
    """The byte-level tokenizer behind a normalizer."""

    def build() -> Tokenizer:
        tokenizer = byte_bpe()
        tokenizer.normalizer = normalizers.Sequence(list(parts))
        return tokenizer

    return build


_INVISIBLE = "[\u200b-\u200f\u2060\ufeff]"


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer.

    Args:
        build: Trains it.
        after: What is lost of a text beside what the normalizer changes.
        flags: Of every control token and marker.
        unknown: The token for what it cannot spell, or nothing.
    """

    build: Callable[[], Tokenizer]
    after: Callable[[str], str] = lambda text: text
    flags: tuple[str, ...] = ()
    unknown: str | None = None


def _spaces(text: str) -> str:
    return text.replace("▁", " ")


def _bytes_and_spaces(text: str) -> str:
    """Unigram models find their byte pieces, such as <0x41>, in texts that spell them."""
    return re.sub(r"(?:<0x[0-9A-F]{2}>)+", lambda match: _decoded(match.group()), _spaces(text))


def _decoded(spelled: str) -> str:
    raw = bytes.fromhex("".join(re.findall(r"0x(..)", spelled)))
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(raw)


def squeezed(text: str) -> str:
    """Text without white space."""
    return re.sub(r"[\s▁]", "", text)


KINDS: dict[str, Kind] = {
    "byte_bpe": Kind(byte_bpe),
    "byte_bpe_flags": Kind(byte_bpe, flags=("lstrip", "rstrip")),
    "byte_bpe_single_word": Kind(byte_bpe, flags=("single_word",)),
    "tekken": Kind(tekken),
    "nfc": Kind(with_normalizer(normalizers.NFC())),
    "nfkc": Kind(with_normalizer(normalizers.NFKC())),
    "nfkc_normalized": Kind(with_normalizer(normalizers.NFKC()), flags=("normalized",)),
    "lower_normalized": Kind(with_normalizer(normalizers.Lowercase()), flags=("normalized",)),
    "invisible": Kind(
        with_normalizer(normalizers.Replace(Regex(_INVISIBLE), ""), normalizers.Strip()), flags=("normalized",)
    ),
    "sentencepiece_bpe": Kind(sentencepiece_bpe, lambda text: _spaces(text)[1:], unknown="<unk>"),
    "sentencepiece_unknown": Kind(
        functools.partial(sentencepiece_bpe, byte_fallback=False), lambda text: _spaces(text)[1:], unknown="<unk>"
    ),
    "sentencepiece_unigram": Kind(sentencepiece_unigram, _bytes_and_spaces, unknown="<unk>"),
    "wordpiece": Kind(wordpiece, squeezed, unknown="[UNK]"),
}
EXACT = ("byte_bpe", "byte_bpe_flags", "tekken")
"""Kinds from whose tokens every text comes back unchanged."""


@functools.cache
def _trained(kind: str) -> str:
    return KINDS[kind].build().to_str()


# --- chat templates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """A chat template and the tokens that it needs.

    Args:
        template: The template.
        special: Special tokens of it; the first is bos, the second eos.
        plain: Role tokens that the tokenizer knows, but not as special: DeepSeek's.
        blocks: Blocks that are tokens, not special: Qwen's <think>.
        system: Whether it takes a system turn.
    """

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    system: bool = True


_CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_FOR = "{% for m in messages %}"
_END = "{% endfor %}"


def _prompt(text: str) -> str:
    return "{% if add_generation_prompt %}" + text + "{% endif %}"


_IM = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
_THINK = ("<think>", "</think>")
STYLES: dict[str, Style] = {
    "chatml": Style(_FOR + _CHATML + _END + _prompt("<|im_start|>assistant\n"), _IM),
    "llama2": Style(
        "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
        + _FOR
        + "{% set c = s + m.content if loop.first else m.content %}{% if m.role == 'assistant' %}"
        "{{ ' ' + c | trim + ' ' + eos_token }}{% else %}{{ bos_token + '[INST] ' + c | trim + ' [/INST]' }}{% endif %}"
        + _END,
        ("<s>", "</s>"),
    ),
    "llama3": Style(
        "{{ bos_token }}"
        + _FOR
        + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        + _END
        + _prompt("<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    ),
    "mistral": Style(
        "{{ bos_token }}"
        + _FOR
        + "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
        "{{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('no system turns') }}{% endif %}" + _END,
        ("<s>", "</s>", "[INST]", "[/INST]"),
        system=False,
    ),
    "gemma": Style(  # the system turn becomes the beginning of the first user turn
        "{{ bos_token }}{% set s = '' %}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}"
        + _FOR
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
        "{{ s if loop.first }}{{ m.content | trim }}<end_of_turn>\n" + _END + _prompt("<start_of_turn>model\n"),
        ("<bos>", "<end_of_turn>", "<start_of_turn>"),
    ),
    "deepseek": Style(  # no token opens a system turn, and the tokens of the roles are not special
        "{{ bos_token }}" + _FOR + "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}"
        + _END
        + _prompt("<｜Assistant｜>"),
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        plain=("<｜User｜>", "<｜Assistant｜>"),
    ),
    "think_strip": Style(  # Qwen 3: earlier blocks are cut out, an empty one is put into the prompt
        _FOR + "{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n"
        + _END
        + _prompt("<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        _IM,
        blocks=_THINK,
    ),
    "think_insert": Style(  # every answer gets a block
        _FOR + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>"
        "{% endif %}{{ m.content }}<|im_end|>\n" + _END + _prompt("<|im_start|>assistant\n<think></think>"),
        _IM,
        blocks=_THINK,
    ),
    "think_rewrite": Style(  # blocks are special tokens and spelled another way
        "{{ bos_token }}"
        + _FOR
        + "{% if m.role == 'assistant' %}[THINK]{{ m.content.split('</think>')[0] if '</think>' in "
        "m.content }}[/THINK]{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% else %}[INST]{{ m.content }}[/INST]"
        "{% endif %}" + _END,
        ("<s>", "</s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]"),
    ),
    "joined": Style(  # nothing stands between a system turn and the user turn behind it
        "{{ bos_token }}" + _FOR + "{% if m.role == 'assistant' %}[/INST]{{ m.content | trim }}{{ eos_token }}"
        "{% elif m.role == 'system' %}{{ m.content | trim }}{% else %}{{ m.content | trim }}{% endif %}"
        + _END
        + _prompt("[/INST]"),
        ("<s>", "</s>", "[/INST]"),
    ),
    "no_system": Style(
        _FOR + "{% if m.role != 'system' %}" + _CHATML + "{% endif %}" + _END + _prompt("<|im_start|>assistant\n"), _IM
    ),
    "spelled": Style(  # roles are put together, and a text stands in signs that markers begin and end with
        _FOR + "<|{{ m.role }}|><{{ m.content }}><|end|>" + _END + _prompt("<|assistant|>"),
        ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
    ),
}


# --- dialects -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialect:
    """A tokenizer with a chat template and the markers."""

    kind: str
    style: str
    codec: ChainCodec

    @property
    def control(self) -> set[int]:
        """Ids that give a dialogue its form: special tokens, the tokens of the roles, markers."""
        decoder = self.codec.tokenizer.added_tokens_decoder
        plain = STYLES[self.style].plain
        unknown = KINDS[self.kind].unknown  # what the tokenizer cannot spell; no template writes it
        return {
            id_
            for id_, token in decoder.items()
            if (token.special or token.content in plain) and token.content != unknown
        }

    def controls(self, ids: Iterable[int]) -> list[str]:
        """The control tokens among ids."""
        control = self.control
        return [str(self.codec.tokenizer.convert_ids_to_tokens(token)) for token in ids if token in control]

    def canonical(self, text: str) -> str:
        """What the tokenizer leaves of a text."""
        normalizer = self.codec.tokenizer.backend_tokenizer.normalizer
        return KINDS[self.kind].after(text if normalizer is None else str(normalizer.normalize_str(text)))

    def is_broken_up(self, texts: Iterable[str]) -> bool:
        """Whether texts hold what is encoded in parts or is a token, behind which SentencePiece writes a space."""
        parts = [
            *STYLES[self.style].plain,
            *STYLES[self.style].blocks,
            *(("<unk>", "<s>", "</s>") if self.kind == "sentencepiece_unigram" else ()),
        ]
        seen = "\n".join(map(self.canonical, texts))
        return self.kind.startswith("sentencepiece") and any(self.canonical(part).strip() in seen for part in parts)

    def question(self, ids: Sequence[int]) -> str:
        """The text of a question."""
        return str(self.codec.tokenizer.decode(list(ids)))


@functools.cache
def dialect(kind: str, style: str, steps: tuple[str, ...] = STEPS) -> Dialect:
    """The dialect of a kind of tokenizer and a style of template."""
    made, look = KINDS[kind], STYLES[style]
    flags: dict[str, Any] = dict.fromkeys(made.flags, True)
    backend = Tokenizer.from_str(_trained(kind))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=made.unknown, pad_token="[PAD]" if kind == "wordpiece" else "<|pad|>"
    )
    own = flags if "single_word" not in flags else {}  # templates write their tokens beside words
    special = [AddedToken(token, special=True, **{"normalized": False, **own}) for token in look.special]
    special += [AddedToken(token, special=True, **{"normalized": False, **flags}) for token in markers(steps)]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (*look.plain, *look.blocks)])
    tokenizer.add_special_tokens(
        {"bos_token": special[0], "eos_token": special[1], "additional_special_tokens": special[2:]}
    )
    tokenizer.chat_template = look.template
    return Dialect(kind, style, ChainCodec(tokenizer, steps))
