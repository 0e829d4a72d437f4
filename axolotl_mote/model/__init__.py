"""The step-routed LoRA: torch, transformers and peft only; no axolotl, no data sets.

The modules, each importing only those before it:

    compat      every patch and private name of torch, transformers and peft
    config      MoteConfig: what adapter_config.json holds
    routing     tokens to step ids, gates, draws and positions
    masks       who sees whom under step dropout, for each kind of attention
    attention   step dropout in the model's own attention
    loss        cross-entropy weighted and counted by step
    markers     the rows of the marker tokens, at both ends of the model
    adapter     the PEFT tuner
"""

# First of all: once peft is complete, the hook in axolotl_mote/__init__.py imports axolotl_mote.model.adapter. Were
# peft imported by a module below, that module would be half imported at that moment.
import peft as _peft  # noqa: F401
