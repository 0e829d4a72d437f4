"""`chat_template_kwargs`: fixed in the chat template, which training saves beside the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl_mote.chain.templates import fix_variables


def fix_template(cfg: dict[str, Any]) -> None:
    """Fix `chat_template_kwargs` in the chat template of a raw configuration.

    axolotl gives them to its own strategies only. As a part of the template they hold in training, in `axolotl
    inference`, in ``load_mote`` and in every server of an exported model.

    Args:
        cfg: The raw configuration; `chat_template` and `chat_template_jinja` are set.

    Raises:
        ValueError: If the template does not read one of them.
    """
    values = cfg["chat_template_kwargs"]
    if not isinstance(values, Mapping):  # axolotl refuses it
        return
    from axolotl.utils.chat_templates import get_chat_template_from_config
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        cfg.get("tokenizer_config") or cfg.get("base_model_config") or cfg["base_model"],
        trust_remote_code=bool(cfg.get("trust_remote_code")),
        revision=cfg.get("revision_of_model") or "main",
    )
    template = str(get_chat_template_from_config(cfg, tokenizer=tokenizer))
    if cfg.get("default_system_message") and cfg.get("chat_template") == "chatml":  # as axolotl does
        template = template.replace("You are a helpful assistant.", cfg["default_system_message"])
    cfg["chat_template"], cfg["chat_template_jinja"] = "jinja", fix_variables(template, values)
