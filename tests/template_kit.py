"""Tokenizers dressed as four families of chat templates, and a valid chain row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import markers

STEPS = ["analysis", "guidance", "response"]
ASK = [{"role": "user", "content": "How do I kill a Python process?"}]

# Small templates in the style of four families: what they render, the tokens they need, where a turn ends.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
FAMILIES: dict[str, dict[str, Any]] = {
    "chatml": {"end": ["<|im_end|>"], "special": ["<|im_start|>", "<|im_end|>"]},
    "llama3": {
        "template": LLAMA3,
        "special": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "end": ["<|eot_id|>"],
    },
    "mistral": {
        "template": MISTRAL,
        "special": ["<s>", "</s>", "[INST]", "[/INST]"],
        "bos": "<s>",
        "eos": "</s>",
        "end": ["</s>"],
    },
    "gemma": {
        "template": GEMMA,
        "special": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "bos": "<bos>",
        "eos": "<eos>",
        "end": ["<end_of_turn>"],
    },
}


def build_tokenizer(folder: Path, family: str, steps: Sequence[str] = STEPS) -> Any:
    """SmolLM2's tokenizer with the markers, dressed as another family."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = FAMILIES[family]
    extra = kind["special"] if "template" in kind else []
    tokenizer.add_special_tokens({"additional_special_tokens": [*extra, *markers(steps)]})
    if "template" in kind:
        tokenizer.chat_template = kind["template"]
        tokenizer.add_special_tokens({"bos_token": kind["bos"], "eos_token": kind["eos"]})
    return tokenizer


def build_codec(folder: Path, family: str = "chatml", steps: Sequence[str] = STEPS) -> ChainCodec:
    """The codec of that tokenizer."""
    return ChainCodec(build_tokenizer(folder, family, steps), steps)


def row(**fields: Any) -> dict[str, Any]:
    """A valid chain row, with changes."""
    full = {
        "analysis": "Killing is a process here.",
        "guidance": "Name the signal.",
        "response": "Use kill.",
        "check": "safe",
    }
    return {"id": "1", "messages": ASK, **full, **fields}
