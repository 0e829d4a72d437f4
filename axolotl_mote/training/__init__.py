"""Training with axolotl. Beside the doctor, the only room that imports axolotl, accelerate or DeepSpeed.

The modules, each importing only those before it:

    output       the folder that a run saves to
    compat       every patch and private name of axolotl, accelerate and DeepSpeed
    args         the `mote:` block, and the keys that do not work with it
    base_model   the base model: quantization, attention, compilation
    dataset      `type: axolotl_mote.chain`: files checked, rows encoded
    template     `chat_template_kwargs`, fixed in the chat template
    hosts        data and versions of all hosts compared
    checkpoints  which checkpoint a run resumes from
    trainer      the loss by step, its item count and its metrics
    selfcheck    when training checks itself
    card         the model card in the adapter's folder
    plugin       MotePlugin: the hooks, wiring only
"""
