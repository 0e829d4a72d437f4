"""Entry point of group vllm.general_plugins: vLLM calls it in every process, possibly more than once."""

from __future__ import annotations

import logging

from axolotl_mote.serving.command import PARSER

LOG = logging.getLogger("vllm.axolotl_mote")


def register() -> None:
    """Install the hooks and the reasoning parser.

    Where vLLM is not a tested version, nothing is changed: other models are served as ever, and vLLM refuses the file
    of a MoTE adapter by the names of its marker rows.
    """
    from vllm.reasoning import ReasoningParserManager

    from axolotl_mote.serving.compat import install

    try:
        install()
    except RuntimeError as error:
        LOG.error("MoTE adapters cannot be served: %s", error)
    else:
        ReasoningParserManager.register_lazy_module(PARSER, "axolotl_mote.serving.parser", "MoteReasoningParser")
