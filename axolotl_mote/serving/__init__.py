"""A vLLM plugin: MoTE adapters are routed by step inside the engine. Also what an OpenAI client needs around it.

To vLLM an adapter is one LoRA of rank R = (S + 1) * r. The plugin multiplies its inner activation by the gate of the
token's step, between shrink and expand: y = W x + B((A x) * gate[step]). The modules, each importing only those before
it:

    routes     what an adapter's folder says about routing; the steps of scheduled tokens. Tensors only
    gate       the buffer that the engine's layers multiply by
    kernel     the routing of the V2 runner as one Triton kernel
    reasoning  a generated chain as reasoning and answer, in one piece or streamed
    chains     which token may come next, from the steps that a request asks for
    command    an exported folder to the arguments of `vllm serve`
    check      what a server says, compared with the step-routed model on transformers
    refusals   what the engine would answer wrongly: options, adapters, requests
    compat     the hooks: everything that touches vLLM's private names
    logits     the step grammar as vLLM's logits processors
    parser     the reasoning parser as vLLM calls it
    plugin     entry point of group vllm.general_plugins

Only kernel, refusals, compat, logits, parser and plugin need vLLM.
"""
