"""The language of chains: steps and markers, the rule that gives a token its step, the codec, row checks.

The modules, each importing only those before it:

    steps        names, order and marker strings of the steps
    vocabulary   StepVocabulary, and the rule that gives a token its step (``advance``)
    quoting      foreign text: quoted, control tokens broken up
    questions    Question: a dialogue that ends in a user turn
    result       Chain: what comes out of a generation
    parsing      a chain read off token ids
    templates    variables fixed in a chat template, and blocks that it leaves open
    codec        ChainCodec: text to ids and back; the safety boundary for foreign text
    rows         checks of chain rows

``load`` is what axolotl calls for ``type: axolotl_mote.chain``.
"""

from __future__ import annotations

from typing import Any


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> Any:
    """Entry point of ``type: axolotl_mote.chain``.

    The one upward import of the package: axolotl looks for this function here, and the strategy belongs to training.

    Args:
        tokenizer: axolotl's tokenizer, with the markers added by the plugin.
        cfg: axolotl's configuration; ``mote.steps`` and ``sequence_len`` are read.
        ds_cfg: The data set's entry, for its name in messages.

    Returns:
        axolotl's wrapping strategy: rows in, tokenized rows out.
    """
    from axolotl_mote.training.dataset import chain_strategy

    return chain_strategy(tokenizer, cfg, ds_cfg)
