"""The one kit of tiny models: random models of every family, adapters whose routing mistakes show, a byte tokenizer,
and an independent reference that recomputes everything from scratch.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import markers
from axolotl_mote.model.adapter import MoteModel, add_mote_adapter, mote_model
from axolotl_mote.model.config import MoteConfig

VOCABULARY = 96
STEPS = ("analysis", "guidance", "response")
MARKER_IDS = list(range(VOCABULARY, VOCABULARY + 6))  # beyond the table: no row of the base model is used

SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_KINDS = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZE),
    "llama_tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZE, sliding_window=7),
    "qwen2": Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=7, layer_types=_KINDS),
    "qwen3": Qwen3Config(**SIZE, head_dim=8),
    "gemma2": Gemma2Config(
        **SIZE, head_dim=8, query_pre_attn_scalar=8, sliding_window=7, layer_types=_KINDS, final_logit_softcapping=5.0
    ),
    "gemma3": Gemma3TextConfig(**SIZE, head_dim=8, query_pre_attn_scalar=8, sliding_window=7, layer_types=_KINDS),
    "phi3": Phi3Config(**SIZE, sliding_window=7),
}


def base_model(family: str = "llama", attention: str | None = None) -> PreTrainedModel:
    """A tiny random model in float32, by default with the attention that transformers chooses for the family."""
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.eval()


@functools.cache
def takes(family: str, attention: str) -> bool:
    """Whether the installed transformers offers an attention implementation to a family: Gemma 2 lost sdpa in 5.21."""
    try:
        base_model(family, attention)
    except ValueError:
        return False
    return True


def mote_config(**kwargs: object) -> MoteConfig:
    """A small configuration over the tiny vocabulary."""
    values = {"r": 2, "lora_alpha": 4, "steps": list(STEPS), "marker_ids": MARKER_IDS, "target_modules": "all-linear"}
    return MoteConfig(**{**values, **kwargs})


def randomize(model: PeftModel, scale: float = 0.3) -> MoteModel:
    """Give every expert and marker row its own random values, so that a wrong routing shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_marker_rows" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    tuner = mote_model(model)
    assert tuner is not None
    return tuner


def mote(family: str = "llama", attention: str | None = None, **kwargs: object) -> PeftModel:
    """A tiny model with a randomized MoTE adapter, in evaluation mode."""
    model = add_mote_adapter(base_model(family, attention), mote_config(**kwargs))
    randomize(model)
    return model.eval()


def chain(question: int = 5, analysis: int = 4, guidance: int = 3, response: int = 6, seed: int = 0) -> list[int]:
    """Token ids of a chain; each number is a count of ordinary tokens and 0 leaves the step out."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    ids = words(question)
    for step, count in enumerate((analysis, guidance, response)):
        if count:
            ids += [MARKER_IDS[2 * step], *words(count), MARKER_IDS[2 * step + 1]]
    return [*ids, 2]


# --- models that read text: a byte tokenizer, adapters with random experts ------------------------------------------

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(steps: Sequence[str] = STEPS) -> PreTrainedTokenizerFast:
    """One token per byte, a chat template, and the markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return with_markers(tokenizer, steps)


def with_markers(tokenizer: Any, steps: Sequence[str] = STEPS) -> Any:
    """Add the markers as special tokens, as the plugin does."""
    tokenizer.add_special_tokens({"additional_special_tokens": markers(steps)}, replace_extra_special_tokens=False)
    return tokenizer


def tiny_model(
    vocab_size: int = 259, *, tied: bool = True, hidden: int = 32, layers: int = 2, initializer_range: float = 0.2
) -> LlamaForCausalLM:
    """A random Llama whose table ends before the markers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def random_adapter(
    model: Any,
    tokenizer: Any,
    steps: Sequence[str] = STEPS,
    r: int = 4,
    seed: int = 1,
    scale: float = 0.3,
    marker_scale: float = 3.0,
    **options: Any,
) -> PeftModel:
    """A MoTE adapter with random experts, all different, so that a wrong expert changes the logits."""
    codec = ChainCodec(tokenizer, steps)
    config = MoteConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules=LINEARS,
        steps=list(steps),
        marker_ids=codec.vocabulary.marker_ids,
        task_type="CAUSAL_LM",
        **options,
    )
    peft_model = add_mote_adapter(model, config, codec.marker_words())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / parameter.shape[1] ** 0.5)
            elif "lora_marker_rows" in name:
                spread = parameter.std().item()
                # Larger than the words they start from, so that steps also end on their own.
                parameter.add_(torch.randn(parameter.shape, generator=generator) * marker_scale * spread)
    return peft_model.eval()


def tiny_mote(steps: Sequence[str] = STEPS, *, tied: bool = True, **options: Any) -> tuple[PeftModel, Any]:
    """Tiny model with random adapter, and its tokenizer."""
    tokenizer = tiny_tokenizer(steps)
    return random_adapter(tiny_model(tied=tied), tokenizer, steps, **options), tokenizer


def smol_mote(
    folder: Path, steps: Sequence[str] = STEPS, r: int = 8, scale: float = 0.15, **options: Any
) -> tuple[PeftModel, Any]:
    """The real SmolLM2 in float32 with a random adapter, and its tokenizer."""
    tokenizer = with_markers(AutoTokenizer.from_pretrained(folder), steps)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return random_adapter(model, tokenizer, steps, r=r, scale=scale, **options), tokenizer


def save_adapter(model: PeftModel, tokenizer: Any, folder: Path, base: Path | str | None = None) -> Path:
    """An adapter folder as training writes it."""
    if base is not None:
        model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def naive_step_ids(ids: Sequence[int], config: MoteConfig) -> list[int]:
    """An independent oracle of the rule in chain/vocabulary.py: it shares no code with ``advance``."""
    starts, ends = config.marker_ids[0::2], config.marker_ids[1::2]
    steps, current = [], 0
    for token in ids:
        if token in starts:
            current = starts.index(token) + 1
        steps.append(current)
        if token in ends and ends.index(token) + 1 == current:
            current = 0
    return steps


class Reference:
    """Full forward over one unpadded row without PEFT, gates or caches: y = W x + s (w B_k A_k + (1 - w) B_s A_s) x.

    Works on a copy of the base model whose tables are extended by the marker rows.
    """

    def __init__(self, mote: PeftModel) -> None:
        self.config: MoteConfig = mote.peft_config["default"]
        self.weights = {k: v.detach().clone() for k, v in mote.state_dict().items() if "lora_" in k}
        wrapped = mote.get_base_model()
        table = wrapped.get_input_embeddings().base_layer.weight.detach()
        head = wrapped.get_output_embeddings().base_layer.weight.detach()
        config = copy.deepcopy(wrapped.config)
        rows = max(len(table), max(self.config.marker_ids) + 1)
        config.vocab_size = rows
        plain = type(wrapped)(config).eval()
        state = {
            k.replace(".base_layer.", "."): v.detach() for k, v in wrapped.state_dict().items() if "lora_" not in k
        }
        state["model.embed_tokens.weight"] = self._extended(table, rows, "embed_tokens")
        state["lm_head.weight"] = self._extended(head, rows, "lm_head")
        plain.load_state_dict(state, strict=False)
        self.model = plain
        self.steps: torch.Tensor | None = None
        for name, module in plain.named_modules():
            if name.split(".")[-1] in LINEARS:
                module.register_forward_hook(self._delta(name))

    def _extended(self, table: torch.Tensor, rows: int, part: str) -> torch.Tensor:
        names = [k for k in self.weights if "marker_rows" in k and part in k]
        names = names or [k for k in self.weights if "marker_rows" in k]
        marker = self.weights[names[0]].to(table.dtype)
        extended = table.new_zeros(rows, table.shape[1])
        extended[: len(table)] = table
        extended[self.config.marker_ids] = marker
        return extended

    def _delta(self, name: str) -> Any:
        a = next(v for k, v in self.weights.items() if f".{name}.lora_A" in k)
        b = next(v for k, v in self.weights.items() if f".{name}.lora_B" in k)
        r, w = self.config.r, self.config.expert_weight
        blocks = [b[:, k * r : (k + 1) * r] @ a[k * r : (k + 1) * r] for k in range(len(self.config.steps) + 1)]
        shared = (1 - w) * blocks[-1]
        experts = [w * sum(blocks[:-1]) / len(self.config.steps), *(w * block for block in blocks[:-1])]
        updates = [self.config.lora_alpha / r * (shared + expert) for expert in experts]

        def hook(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            delta = torch.stack([updates[k] @ x for k, x in zip(self.steps, args[0][0], strict=True)])
            return output + delta[None]

        return hook

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits of one row, (T, V)."""
        self.steps = naive_step_ids(ids, self.config)
        return self.model(input_ids=torch.tensor([list(ids)])).logits[0]


def plain_lora(path: Path, tied: bool = True, steps: tuple[str, ...] = STEPS) -> tuple[Path, torch.nn.Module]:
    """The baseline as the plugin trains it: a resized base model, and the rows of the markers in the adapter."""
    tokenizer = tiny_tokenizer(steps)
    tiny_model(tied=tied).save_pretrained(path / "base")
    base = tiny_model(tied=tied)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = ChainCodec(tokenizer, steps).vocabulary.marker_ids
    tables = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=LINEARS,
        trainable_token_indices=dict.fromkeys(tables, ids),
        task_type="CAUSAL_LM",
        fan_in_fan_out=None,  # as axolotl writes it
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return save_adapter(model, tokenizer, path / "lora", path / "base"), model.eval()
