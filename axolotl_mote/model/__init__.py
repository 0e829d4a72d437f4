"""The step-routed LoRA: torch, transformers and peft only; no axolotl, no data sets.

The modules, each importing only those before it:

    compat      every patch and private name of torch, transformers and peft
    config      MoteConfig: what adapter_config.json holds
    routing     tokens to step ids, gates, draws and positions
    masks       which tokens a token attends to under step dropout
    attention   step dropout in the model's own attention
    loss        cross-entropy weighted by step
    markers     the marker rows of the input embedding and the LM head
    origin      which base model an adapter was trained on
    head        the model's own path from hidden states to logits
    targets     which layers get experts
    compiling   each decoder layer compiled on its own
    routed      the base model whose forward routes
    adapter     the PEFT tuner
    selfcheck   the equalities that the adapter relies on, tested on one short chain
"""

# First of all: once peft is complete, the hook in axolotl_mote/__init__.py imports axolotl_mote.model.adapter. Were
# peft imported by a module below, that module would be half imported at that moment.
import peft as _peft  # noqa: F401
