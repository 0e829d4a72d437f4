"""A tiny random model of every family of causal models that the installed transformers knows.

The default configuration of a family is shrunk by the names of its values; ``OVERRIDES`` holds what that cannot know.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

VOCABULARY = 259  # the size of kit.tiny_tokenizer without its markers, which lie beyond the table
_UNUSED = VOCABULARY - 1  # a token that no chain holds: of images, sounds and the like

_SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length "
    "original_max_position_embeddings max_seq_length",
    64: "intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size "
    "dim_ff dff d_inner shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "intermediate_size_mlp dense_intermediate_size moe_shared_expert_intermediate_size feed_forward_size mlp_dim",
    32: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim dim_model_base word_embed_proj_dim "
    "input_embedding_size output_embedding_size attention_hidden_size lru_width out_hidden_size kv_lora_rank "
    "q_lora_rank o_lora_rank backbone_hidden_size router_hidden_size projector_input_dim projector_output_dim "
    "vision_output_dim",
    16: "qk_head_dim mamba_d_state state_size ssm_state_size hidden_size_per_layer_input laurel_rank hc_lowrank",
    8: "head_dim qk_rope_head_dim v_head_dim qk_nope_head_dim global_head_dim sliding_window attention_window_size "
    "window_size local_attention attention_chunk_size linear_key_head_dim linear_value_head_dim query_pre_attn_scalar "
    "dim_head d_head kv_channels mamba_d_head mamba_headdim mamba_head_dim rotary_dim index_head_dim swa_head_dim "
    "sliding_window_size attention_head_dim mamba_chunk_size chunk_size time_step_rank mamba_dt_rank adapter_rank "
    "keep_window_size index_topk",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts index_n_heads linear_num_value_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads depth",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks num_key_value_heads num_kv_heads linear_num_key_heads num_experts_per_tok moe_topk "
    "moe_k swa_num_key_value_heads num_query_groups mamba_n_groups n_groups",
    1: "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts "
    "moe_layer_start_index",
    0: "num_kv_shared_layers pad_token_id",
}
SMALL: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
# What is 1 or off by default would hide a forward that forgets it.
SMALL |= {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "logits_scaling": 2.0,
    "logit_scale": 0.5,
    "lm_head_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 1.5,
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 2.0,
    "output_logit_soft_cap": 2.0,
}

_LATENT = {"num_key_value_heads": 4}  # a head of keys for every head of queries
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_FOUR = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_QUERY_SPARSE = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bamba": {**_MAMBA, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
        "global_config": {"hidden_size": 64},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {**_FOUR, "num_kv_shared_layers": 2},
    "gemma4_text": {**_FOUR, "num_kv_shared_layers": 2},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "got_ocr2": {"vision_config": {"image_size": 64, "global_attn_indexes": [1], "output_channels": 16}},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**_LATENT, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "minicpm3": _LATENT,
    "phi4_multimodal": {"vision_config": {"crop_size": 64, "image_size": 64}, "audio_config": {"num_blocks": 1}},
    "qwen4_exp": {"text_config": _QUERY_SPARSE},
    "qwen4_exp_text": _QUERY_SPARSE,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"]},
    "roc_bert": {"shape_vocab_size": 259, "pronunciation_vocab_size": 259},
    "nemotron": {"num_key_value_heads": 2},
    "xlstm": {"chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def _layers(values: dict[str, Any], count: int) -> dict[str, Any]:
    """One layer of each kind: the lists that hold a value per layer, cut to the first layer of each kind."""
    lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == count > 2}
    kinds = [tuple(map(str, kind)) for kind in zip(*lists.values(), strict=True)]
    chosen = sorted({kinds.index(kind) for kind in kinds}) or [0]
    chosen = chosen * 2 if len(chosen) == 1 else chosen
    return {k: [v[i] for i in chosen] for k, v in lists.items()} | {"count": len(chosen)}


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """Arguments for a small configuration of the same kind."""
    small: dict[str, Any] = {}
    values = config.to_dict()
    for name, value in values.items():
        if name in getattr(config, "sub_configs", {}):
            small[name] = _shrunk(getattr(config, name)) if getattr(config, name) is not None else None
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and ("drop" in name or "jitter" in name):
            small[name] = type(value)(0)
        elif name in SMALL and (value is not None or name == "head_dim"):
            small[name] = SMALL[name]
        elif isinstance(value, int) and name.endswith(("_token_id", "_token_index")):
            small[name] = _UNUSED
    layers = _layers(values, getattr(config, "num_hidden_layers", 0) or 0)
    count = layers.pop("count")
    names = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"} & values.keys()
    return small | layers | (dict.fromkeys(names, count) if layers else {})


def tiny_config(family: str) -> PretrainedConfig:
    """A small configuration of a family."""
    cls = CONFIG_MAPPING[family]
    overrides = dict(OVERRIDES.get(family, {}))
    values = _shrunk(cls(**overrides.pop("default", {})))
    return cls(**_merged(values, overrides))


def _merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides reach into the configurations of parts."""
    both = {k: _merged(values[k], v) for k, v in overrides.items() if isinstance(v, dict) and k in values}
    return {**values, **overrides, **both}


def tiny_model(family: str) -> PreTrainedModel:
    """A small random model of a family in float32: equal at every call, and no part of it without effect."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:  # hidden states, scores and logits of about 1
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()
