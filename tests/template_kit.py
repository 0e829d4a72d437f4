"""Tokenizers dressed as families of chat templates, axolotl's own among them, and a valid chain row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.quoting import CONTROL_TOKEN
from axolotl_mote.chain.steps import markers

STEPS = ["analysis", "guidance", "response"]
ASK = [{"role": "user", "content": "How do I kill a Python process?"}]

# Small templates in the style of five families: what they render, the tokens they need, where a turn ends.
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
COMMAND = (  # writes two tokens after an answer, and opens the next turn without being asked
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|START|><|BOT|><|SAY|>{{ m.content }}<|/SAY|>"
    "<|END|>{% else %}<|START|><|USER|>{{ m.content }}<|END|>{% endif %}{% endfor %}<|START|><|BOT|>"
    "{% if add_generation_prompt %}<|SAY|>{% endif %}"
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
    "command": {
        "template": COMMAND,
        "special": ["<bos>", "<|START|>", "<|BOT|>", "<|USER|>", "<|SAY|>", "<|/SAY|>", "<|END|>"],
        "bos": "<bos>",
        "eos": "<|END|>",
        "end": ["<|/SAY|>", "<|END|>"],
    },
}

# What is trained after the answer -> those of axolotl's templates under which it is.
EOS = "<eos>"
_TEMPLATES_BY_END = {
    EOS: "alpaca deepseek_v2 llava metharme pixtral mistral_v1 mistral_v2v3 mistral_v3_tekken mistral_v7_tekken",
    "<|im_end|>": "chatml falcon_h1 nemotron_h phi_4 qwen2_vl qwen3 qwen3_5 qwen_25",
    "<|END_OF_TURN_TOKEN|>": "aya cohere",
    "<|END_RESPONSE|> <|END_OF_TURN_TOKEN|>": "command_a command_a_rag command_a_tool_use",
    "[|endofturn|]": "exaone exaone4",
    "<end_of_turn>": "gemma gemma3 gemma3n",
    "<turn|>": "gemma4 gemma4_unified",
    "<|eot_id|>": "llama3 llama3_2_vision",
    "<|end|>": "phi_3 phi_35",
    "<｜end▁of▁sentence｜>": "deepseek_v3",
    "<|eom|>": "jamba",
    "<|eot|>": "llama4",
}
ENDS = {name: end.split() for end, names in _TEMPLATES_BY_END.items() for name in names.split()}


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


def axolotl_templates() -> dict[str, str]:
    """axolotl's chat templates by name."""
    import axolotl

    folder = Path(axolotl.__path__[0]) / "utils" / "chat_templates" / "templates"
    return {file.stem: file.read_text("utf-8") for file in sorted(folder.glob("*.jinja"))}


def build_universal_tokenizer(folder: Path, steps: Sequence[str] = STEPS) -> Any:
    """SmolLM2's tokenizer with the markers and every control token that one of axolotl's templates writes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = {match.group() for text in axolotl_templates().values() for match in CONTROL_TOKEN.finditer(text)}
    special = sorted(token for token in written if not set(token) & set("'\""))
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, *markers(steps)]})
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": EOS})
    return tokenizer


def row(**fields: Any) -> dict[str, Any]:
    """A valid chain row, with changes."""
    full = {
        "analysis": "Killing is a process here.",
        "guidance": "Name the signal.",
        "response": "Use kill.",
        "check": "safe",
    }
    return {"id": "1", "messages": ASK, **full, **fields}
