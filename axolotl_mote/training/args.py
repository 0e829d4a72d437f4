"""Schema of the `mote:` block, and the keys of axolotl that do not work with it.

Unsupported keys raise an error when the configuration is validated, before a model is loaded. The message names the
key, its value and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from axolotl_mote.chain.codec import ROLES
from axolotl_mote.chain.steps import DEFAULT_STEPS, reasoning_steps, validate_steps

CHAIN_TYPE = "axolotl_mote.chain"


class MoteOptions(BaseModel):
    """The `mote:` block of an axolotl configuration. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")

    steps: list[str] = Field(
        default=list(DEFAULT_STEPS),
        description="Steps of the chain in order, each a column of the data set and an expert. The last one is the "
        "answer; `check` may follow it.",
    )
    expert_weight: float = Field(
        default=0.5, ge=0.0, le=1.0, description="Weight of the step's expert; the shared expert gets the rest."
    )
    question_routing: Literal["random", "mean", "shared"] = Field(
        default="random",
        description="Experts that question tokens are routed to while training: one drawn per document, the mean of "
        "all, or only the shared one. Evaluation and inference use the mean instead of a draw.",
    )
    step_dropout: float | dict[str, float] = Field(
        default=0.3,
        description="Probability of dropping a step while training: later steps do not see it. One value, or one per "
        "step. The answer and what follows it are never dropped.",
    )
    compile: Literal["auto", "layers", "off"] = Field(
        default="auto",
        description="Compile every decoder layer on its own: `auto` does so on CUDA and if `torch_compile` is set.",
    )
    self_check: bool = Field(
        default=True,
        description="Before training, run one short chain through the model and check on it what silently goes wrong "
        "with unknown base models: causality, the loss, and the mask of step dropout.",
    )
    step_loss_weights: dict[str, float] = Field(
        default_factory=dict, description="Weight of each step's tokens in the loss; 1.0 where absent."
    )

    @field_validator("steps")
    @classmethod
    def _check_steps(cls, steps: list[str]) -> list[str]:
        return list(validate_steps(steps))

    @model_validator(mode="after")
    def _check_per_step_values(self) -> MoteOptions:
        for step in self.step_loss_weights:
            if step not in self.steps:
                raise ValueError(f"mote.step_loss_weights must name steps of {self.steps}; got {step!r}. Rename it.")
        for step, weight in self.step_loss_weights.items():
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"mote.step_loss_weights must be 0 or more; got {weight} at {step!r}. Raise it.")
        if isinstance(self.step_dropout, dict):
            for step in self.step_dropout:
                if step not in self.droppable_steps:
                    raise ValueError(
                        f"mote.step_dropout must name steps before the answer, {self.droppable_steps}; got {step!r}. "
                        "Remove it."
                    )
        for probability in self.dropout_probabilities:
            if not 0.0 <= probability <= 1.0:
                raise ValueError(f"mote.step_dropout must be in [0, 1]; got {probability}. Use e.g. 0.3.")
        return self

    @property
    def droppable_steps(self) -> list[str]:
        """The steps before the answer."""
        return list(reasoning_steps(self.steps))

    @property
    def dropout_probabilities(self) -> tuple[float, ...]:
        """Probability of dropping each droppable step, in order."""
        if isinstance(self.step_dropout, dict):
            return tuple(self.step_dropout.get(step, 0.0) for step in self.droppable_steps)
        return (self.step_dropout,) * len(self.droppable_steps)

    @property
    def loss_weights(self) -> list[float]:
        """Loss weight by step id; index 0 is the end-of-turn token, whose weight is always 1."""
        return [1.0] + [self.step_loss_weights.get(step, 1.0) for step in self.steps]


# Each of these keys maps to the reason and what to do; docs/generate.py turns them into a table.
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")

REFUSED: dict[str, str] = {
    **dict.fromkeys(KERNELS, "The fused kernels bypass the gate. Remove it; mote.compile compiles the layers instead."),
    "merge_lora": "Step-routed experts have no single merged weight. Use `axolotl mote export` instead of merge-lora.",
    "merge_method": "Step-routed experts have no single merged weight. Use `axolotl mote export`.",
    "relora": "Experts are never merged while training. Remove it.",
    "peft_use_dora": "DoRA's magnitude would be shared by all experts. Remove it.",
    "peft_use_rslora": "The scaling is lora_alpha / lora_r. Remove it and raise lora_alpha.",
    "peft_layer_replication": "Replicated layers cannot be routed. Remove it.",
    "lora_rank_pattern": "All experts of all layers have rank lora_r. Remove it.",
    "lora_alpha_pattern": "All experts of all layers share lora_alpha. Remove it.",
    "lora_target_parameters": "Only linear layers carry experts. Use lora_target_linear: true.",
    "lora_modules_to_save": "The marker rows are trained on their own; whole modules are never saved. Remove it.",
    "lora_fan_in_fan_out": "Only linear layers carry experts. Remove it.",
    "peft_trainable_token_indices": "The marker rows are trained on their own. Remove it.",
    "shrink_embeddings": "Marker ids may be beyond the table. Remove it.",
    "rl": "Only supervised fine-tuning is supported. Remove it.",
    "vllm": "It serves the base model for online RL. Serve the adapter with `axolotl-mote serve`.",
    "use_ray": "Untested with step routing. Use torchrun or DeepSpeed's launcher on every host.",
    "reward_model": "Only supervised fine-tuning is supported. Remove it.",
    "unfrozen_parameters": "Only the adapter is trained. Remove it.",
    "gptq": "Use a full-precision, 8-bit or 4-bit (bitsandbytes) base.",
    "tokenizer_use_mistral_common": "Marker tokens cannot be added to it. Remove it.",
    "layer_offloading": "Untested with step routing. Use DeepSpeed ZeRO-3 with offload.",
    "use_kernels": "Hub kernels may replace the routed layers. Remove it.",
    "use_pose": "Gaps in the positions mark documents here. Remove it.",
    "tiled_mlp": "The gate covers the whole sequence, not a tile of it. Remove it.",
    "lisa_n_layers": "LISA switches base weights on, which the adapter cannot save. Remove it.",
    "lisa_step_interval": "LISA switches base weights on, which the adapter cannot save. Remove it.",
    "process_reward_model": "Only supervised fine-tuning is supported. Remove it.",
    "eval_table_size": "Evaluation keeps no logits to log. Use generate_samples, or `axolotl mote generate`.",
    "do_bench_eval": "Evaluation keeps no logits to compare. Use `axolotl mote eval`.",
    "tokens": "Only the rows of the markers are trained. Add the tokens to the base model and its tokenizer first.",
    "fix_untrained_tokens": "The base model's tables are never changed. Remove it.",
    "scaling_softmax": "The adapter does not record it, so inference would differ. Remove it.",
    "qat": "Untested with step routing. Remove it.",
    "fp8": "Untested with step routing. Use bf16.",
}
LOSSES = (
    "cut_cross_entropy",
    "chunked_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "flash_attn_cross_entropy",
)
# These concern the data and the loss, so they hold for a plain LoRA baseline too.
REFUSED_WITH_CHAINS: dict[str, str] = {
    "streaming": "Chains are checked before anything is trained. Remove it.",
    "pretraining_dataset": "Chains are checked before anything is trained. Use datasets.",
    "train_on_inputs": "The loss is on the steps, never on the question. Remove it.",
    "eot_tokens": "The end of the turn is read off the chat template. Remove it.",
    "use_eaft": "It would replace the loss of the steps. Remove it.",
    "push_dataset_to_hub": "Prepared data on the hub is found by file names, whatever the files hold. Remove it.",
    "skip_prepare_dataset": "Chains must be encoded. Remove it.",
    "fsdp": "FSDP1 is not supported. Use fsdp_config with fsdp_version: 2, or deepspeed.",
    "trainer_cls": "The loss of the steps needs the plugin's trainer. Remove it.",
    **dict.fromkeys(LOSSES, "The loss of the steps replaces it. Remove it."),
}
# Keys of an entry under `datasets:` with chain data. axolotl reads these before it hands over the rows.
LOADING_KEYS = (
    *("path", "name", "split", "revision", "data_files", "ds_type", "type", "trust_remote_code"),
    *("shards", "shards_idx", "preprocess_shards"),
)
COLUMN_KEYS: dict[str, str] = {
    "field_messages": "column that holds the dialogue, instead of `messages`",
    "message_property_mappings": "keys of a turn, instead of `role` and `content`: `{role: from, content: value}`",
    "roles": "names of roles in the rows: `{user: [human], assistant: [gpt]}`",
    "message_field_role": "older spelling of `message_property_mappings: {role: ...}`",
    "message_field_content": "older spelling of `message_property_mappings: {content: ...}`",
}
_COLUMNS = "The columns of a chain are messages, see field_messages, and one per step, named in mote.steps. Remove it."
_ONE_TEMPLATE = "An adapter has one chat template. Set chat_template at the top level."
_TRAINED = "The steps and the end of the turn are trained, never the question. Remove it."
REFUSED_IN_DATASETS: dict[str, str] = {
    "chat_template": _ONE_TEMPLATE,
    "chat_template_jinja": _ONE_TEMPLATE,
    **dict.fromkeys(("roles_to_train", "train_on_eos", "train_on_eot"), _TRAINED),
    **dict.fromkeys(("message_field_training", "message_field_training_detail"), _TRAINED),
    **dict.fromkeys(("field", "field_human", "field_model", "logprobs_field"), _COLUMNS),
    **dict.fromkeys(("conversation", "input_format", "input_transform"), _COLUMNS),
    "field_tools": "Only role and content of a turn reach the chat template. Write the tools into a system turn.",
    **dict.fromkeys(
        ("field_thinking", "template_thinking_key", "split_thinking"),
        "Only role and content of a turn reach the chat template. Make the reasoning a step.",
    ),
    "drop_system_message": "Inference would not drop it. Remove the system turns from the rows.",
    "temperature": "The loss of the steps has none. Remove it.",
}
# By the last part of their name in `plugins:`; each would replace the trainer or the loss, or train base weights.
REFUSED_PLUGINS: dict[str, str] = {
    "CutCrossEntropyPlugin": "The loss of the steps replaces it. Remove it.",
    "KDPlugin": "It would replace the loss of the steps. Remove it.",
    "DiffusionPlugin": "It would replace the loss of the steps. Remove it.",
    "HatcheryPlugin": "It would replace the trainer. Remove it.",
    "NemoGymPlugin": "Only supervised fine-tuning is supported. Remove it.",
    "SpectrumPlugin": "It unfreezes base weights, which the adapter cannot save. Remove it.",
}
REFUSED_ABOVE_ONE = (
    "context_parallel_size",
    "tensor_parallel_size",
    "expert_parallel_size",
    "sequence_parallel_degree",
)


class MoteArgs(BaseModel):
    """What the plugin adds to axolotl's schema: the `mote:` block, and the checks of `adapter: mote`."""

    mote: MoteOptions | None = Field(default=None, description="Mixture of insighTful Experts; see axolotl_mote.")
    debug: bool | None = Field(
        default=None, description="Set by `axolotl preprocess --debug`: print the first chains, colored by step."
    )

    @model_validator(mode="before")
    @classmethod
    def _check_other_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            check(data)
        return data


def check(cfg: dict[str, Any]) -> None:
    """Check a raw configuration of any adapter.

    Raises:
        ValueError: For the first key that does not work with `adapter: mote`, or with chain data.
    """
    if cfg.get("adapter") == "mote":
        check_config(cfg)
    else:
        check_baseline(cfg)


def read_options(cfg: Any) -> MoteOptions:
    """The `mote:` block of a validated configuration, with its defaults."""
    block = cfg.get("mote") or {}
    if isinstance(block, MoteOptions):
        return block
    return MoteOptions(**(block.to_dict() if hasattr(block, "to_dict") else dict(block)))


def data_entries(cfg: Any) -> dict[str, dict[str, Any]]:
    """The entries under `datasets:` and `test_datasets:`, by where they stand, such as `datasets[0]`."""
    found = {}
    for key in ("datasets", "test_datasets"):
        for number, entry in enumerate(cfg.get(key) or []):
            # axolotl turns them into models of its own while it validates
            values = entry.model_dump(exclude_none=True) if isinstance(entry, BaseModel) else entry
            if isinstance(values, Mapping):
                found[f"{key}[{number}]"] = dict(values)
    return found


def chain_entries(cfg: Any) -> dict[str, dict[str, Any]]:
    """Those of `data_entries` that name chain data."""
    return {where: entry for where, entry in data_entries(cfg).items() if entry.get("type") == CHAIN_TYPE}


def _check_entry(where: str, entry: dict[str, Any]) -> None:
    for key, value in entry.items():
        if key in REFUSED_IN_DATASETS and value:
            raise ValueError(
                f"{where}.{key} must not be set with chain data; got {value!r}. {REFUSED_IN_DATASETS[key]}"
            )
        if key not in {*LOADING_KEYS, *COLUMN_KEYS, *REFUSED_IN_DATASETS}:
            raise ValueError(
                f"{where}.{key} is no key of chain data; got {value!r}. Correct its spelling or remove it."
            )
    _check_columns(where, entry)


def _check_columns(where: str, entry: dict[str, Any]) -> None:
    """Check the keys that name columns: each row is read by them, before axolotl's schema has seen all of them."""
    for key, value in entry.items():
        if key in COLUMN_KEYS and value is not None and not _SHAPES_OF_COLUMNS.get(key, _is_name)(value):
            raise ValueError(
                f"{where}.{key} must be the {COLUMN_KEYS[key]}; got {value!r:.100}. Write it in this form."
            )
    for key, known in (("message_property_mappings", ("role", "content")), ("roles", ROLES)):
        for name in entry.get(key) or {}:
            if name not in known:
                raise ValueError(
                    f"{where}.{key} must name {' or '.join(known)} with chain data; got {name!r}. Remove it."
                )
    seen: dict[str, str] = {}
    for role, names in (entry.get("roles") or {}).items():
        for name in names:
            if seen.setdefault(name, role) != role:
                raise ValueError(
                    f"{where}.roles must give each name one role; got {name!r} for {seen[name]} and {role}. Remove one."
                )


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_map_of_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(name is None or _is_name(name) for name in value.values())


def _is_map_of_lists(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(names, list | tuple) and all(map(_is_name, names)) for names in value.values()
    )


_SHAPES_OF_COLUMNS = {"message_property_mappings": _is_map_of_names, "roles": _is_map_of_lists}
"""Other than a name."""


def check_baseline(cfg: dict[str, Any]) -> None:
    """Check that another adapter ignores no option of `mote:`; steps and loss weights work with every adapter.

    Raises:
        ValueError: For the first such option.
    """
    if chain_entries(cfg):
        _check_data_options(cfg)
        if cfg.get("fsdp_config"):  # PEFT ends with a KeyError when it saves the rows of the markers
            raise ValueError(
                f"fsdp_config must not be set with chain data and adapter: {cfg.get('adapter')}; got "
                f"{cfg['fsdp_config']!r}. Only adapter: mote can be saved whole. Use deepspeed, or adapter: mote."
            )
    for key in ("expert_weight", "question_routing", "step_dropout", "compile"):
        if key in (cfg.get("mote") or {}):
            raise ValueError(
                f"mote.{key} must not be set with adapter: {cfg.get('adapter')}, which would ignore it; got "
                f"{cfg['mote'][key]!r}. Remove it, or set adapter: mote."
            )


_QUANTIZED = "Sharded quantized weights are untested with step routing. Use DeepSpeed ZeRO-3."
_REFUSED_WITH_FSDP = {
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "generate_samples": "Processes whose samples end at different lengths would wait for each other. Remove it.",
}


def _check_fsdp(cfg: dict[str, Any]) -> None:
    """Check that what shards the parameters is FSDP2, and shards what it can gather again."""
    given = cfg.get("fsdp_config")
    if not given or not isinstance(given, Mapping):  # axolotl refuses what is no mapping
        return
    # axolotl takes the keys with and without this prefix.
    options = {str(key).removeprefix("fsdp_"): value for key, value in given.items()}
    named = (cfg.get("fsdp_version"), given.get("version"), given.get("fsdp_version"))
    versions = [str(version) for version in named if version is not None]
    if set(versions) != {"2"}:
        raise ValueError(
            f"fsdp_version must be 2 with adapter: mote; got {' and '.join(versions) or 'none, which means 1'}. FSDP1 "
            "is not supported. Set fsdp_version: 2."
        )
    if options.get("auto_wrap_policy") == "SIZE_BASED_WRAP":
        raise ValueError(
            "fsdp_config.auto_wrap_policy must be TRANSFORMER_BASED_WRAP with adapter: mote; got SIZE_BASED_WRAP, "
            "which also picks lists of layers, and those cannot be sharded. Change it."
        )
    if options.get("offload_params"):
        raise ValueError(
            "fsdp_config.offload_params must not be true with adapter: mote; got true. Untested with step routing. Use "
            "DeepSpeed ZeRO-3 with offload."
        )
    for key, reason in _REFUSED_WITH_FSDP.items():
        if cfg.get(key):
            raise ValueError(f"{key} must not be set with fsdp_config and adapter: mote; got {cfg[key]!r}. {reason}")


def _evaluates_adapter_folder(cfg: dict[str, Any]) -> bool:
    """Whether axolotl would give the adapter folder to lm_eval at the end of training: it does so by default."""
    is_loaded = any(str(name).rpartition(".")[2] == "LMEvalPlugin" for name in cfg.get("plugins") or [])
    return is_loaded and cfg.get("lm_eval_post_train") is not False and not cfg.get("lm_eval_model")


def _check_data_options(cfg: dict[str, Any]) -> None:
    for where, entry in chain_entries(cfg).items():
        _check_entry(where, entry)
    for key, remedy in REFUSED_WITH_CHAINS.items():
        if cfg.get(key):
            raise ValueError(f"{key} must not be set with chain data; got {cfg[key]!r}. {remedy}")
    for name in cfg.get("plugins") or []:
        if reason := REFUSED_PLUGINS.get(str(name).rpartition(".")[2]):
            raise ValueError(f"plugins must not hold this one with chain data; got {name}. {reason}")
    if cfg.get("excess_length_strategy") not in (None, "drop"):
        raise ValueError(
            f"excess_length_strategy must be drop with chain data; got {cfg['excess_length_strategy']!r}. Chains are "
            "never cut. Remove it."
        )


def check_config(cfg: dict[str, Any]) -> None:
    """Check that a configuration has no key that `adapter: mote` does not support.

    Args:
        cfg: The raw configuration.

    Raises:
        ValueError: For the first such key.
    """
    for key, remedy in REFUSED.items():
        if cfg.get(key):
            raise ValueError(f"{key} must not be set with adapter: mote; got {cfg[key]!r}. {remedy}")
    _check_data_options(cfg)
    if data_entries(cfg) and not chain_entries(cfg) and not cfg.get("inference"):
        types = sorted({str(entry.get("type")) for entry in data_entries(cfg).values()})
        raise ValueError(
            f"datasets must hold chain data with adapter: mote; got type {', '.join(types)} only. Rows without steps "
            f"train no expert for any step. Use type: {CHAIN_TYPE}, or adapter: lora."
        )
    for key in REFUSED_ABOVE_ONE:
        if (cfg.get(key) or 1) > 1:
            raise ValueError(
                f"{key} must be 1 with adapter: mote; got {cfg[key]}. Split sequences and layers cannot be "
                "routed. Use DeepSpeed ZeRO-3 or FSDP2 to fit larger models."
            )
    _check_fsdp(cfg)
    if _evaluates_adapter_folder(cfg):
        raise ValueError(
            "lm_eval_post_train must be false with adapter: mote; got true. lm_eval reads output_dir and cannot route "
            "by step. Set it to false, serve the adapter with `axolotl-mote serve` and evaluate the server."
        )
    if cfg.get("peft_init_lora_weights") not in (None, True, False, "gaussian"):
        raise ValueError(
            f"peft_init_lora_weights must be true, false or gaussian with adapter: mote; got "
            f"{cfg['peft_init_lora_weights']!r}. Remove it."
        )
    if (cfg.get("peft") or {}).get("loftq_config"):
        raise ValueError(
            f"peft.loftq_config must not be set with adapter: mote; got {cfg['peft']['loftq_config']!r}. Remove it; "
            "QLoRA needs load_in_4bit only."
        )
    if not cfg.get("lora_r"):
        raise ValueError("lora_r must be set with adapter: mote; got none. Use the paper's 16, the rank of one expert.")
    if not cfg.get("lora_target_linear") and not cfg.get("lora_target_modules"):
        raise ValueError(
            "lora_target_linear or lora_target_modules must be set with adapter: mote; got neither. "
            "Use the paper's lora_target_linear: true."
        )
    targets = cfg.get("lora_target_modules") or []
    for name in [targets] if isinstance(targets, str) else targets:
        if str(name).split(".")[-1] in ("lm_head", "embed_tokens"):
            raise ValueError(
                f"lora_target_modules must name linear layers of the decoder with adapter: mote; got {name!r}, which "
                "carries the marker rows. Remove it."
            )
    if cfg.get("inference") and not cfg.get("lora_model_dir"):
        raise ValueError(
            "lora_model_dir must name a trained adapter for inference with adapter: mote; got none. The experts would "
            "be untrained. Pass --lora-model-dir."
        )
