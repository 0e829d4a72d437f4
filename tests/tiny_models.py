"""Tiny random models of every supported family, and adapters with non-zero experts, for property tests."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from axolotl_mote.model.adapter import MoteModel, add_mote_adapter, mote_model
from axolotl_mote.model.config import MoteConfig

VOCABULARY = 96
STEPS = ["analysis", "guidance", "response"]
MARKER_IDS = list(range(VOCABULARY, VOCABULARY + 6))  # beyond the table: no row of the base model is used

_SIZE = {
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
    "llama": LlamaConfig(**_SIZE),
    "llama_tied": LlamaConfig(**_SIZE, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SIZE, sliding_window=7),
    "qwen2": Qwen2Config(**_SIZE, use_sliding_window=True, sliding_window=7, layer_types=_KINDS),
    "qwen3": Qwen3Config(**_SIZE, head_dim=8),
    "gemma2": Gemma2Config(
        **_SIZE, head_dim=8, query_pre_attn_scalar=8, sliding_window=7, layer_types=_KINDS, final_logit_softcapping=5.0
    ),
    "gemma3": Gemma3TextConfig(**_SIZE, head_dim=8, query_pre_attn_scalar=8, sliding_window=7, layer_types=_KINDS),
    "phi3": Phi3Config(**_SIZE, sliding_window=7),
}


def base_model(family: str = "llama", attention: str = "sdpa") -> PreTrainedModel:
    """A tiny random model in float32."""
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.eval()


def mote_config(**kwargs: object) -> MoteConfig:
    """A small configuration over the tiny vocabulary."""
    values = {"r": 2, "lora_alpha": 4, "steps": STEPS, "marker_ids": MARKER_IDS, "target_modules": "all-linear"}
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


def mote(family: str = "llama", attention: str = "sdpa", **kwargs: object) -> PeftModel:
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
