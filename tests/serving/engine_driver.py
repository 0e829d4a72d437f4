"""Run prompts through vLLM and write what came out; test_engine.py judges it. Arguments: FOLDER OUT OPTIONS."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import conftest  # noqa: E402, F401  (prepares Triton and the environment)
from serving_kit import MODES, SECOND_TURN, dialogues, prompts, stop_id  # noqa: E402

from axolotl_mote.serving import gate  # noqa: E402

ANSWER = 12
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 32,
    "block_size": 32,
    "num_gpu_blocks_override": 30,
    "enable_lora": True,
    "max_lora_rank": 16,
    "max_loras": 4,
    "lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],  # the head with LoRA fails on a CPU
    "enable_prefix_caching": True,
    "disable_log_stats": False,
    "logits_processors": ["axolotl_mote.serving.logits:StepProcessor"],
}


def schedule_asynchronously() -> None:
    """Default on GPUs; the CPU platform turns it off, whatever one asks for."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def generate(
    llm: Any, requests: list[tuple[list[int], str, Any]], extra: list[Any] | None, params: Any
) -> dict[str, Any]:
    """Answer a batch.

    Args:
        llm: The engine.
        requests: Token ids, adapter's name, its LoRA request.
        extra: ``extra_args`` of each request.
        params: Of ``SamplingParams``.

    Returns:
        Rows, and the trace of the plugin.
    """
    from vllm import SamplingParams

    gate.TRACE = []
    params = {"temperature": 0, "ignore_eos": True, "logprobs": 0} | params
    sampling = [SamplingParams(**params, extra_args=args) for args in extra or [None] * len(requests)]
    inputs = [{"prompt_token_ids": ids} for ids, _, _ in requests]
    outputs = llm.generate(inputs, sampling, lora_request=[lora for _, _, lora in requests], use_tqdm=False)
    rows = []
    for (ids, name, _), output in zip(requests, outputs, strict=True):
        answer = output.outputs[0]
        later = (output.prompt_logprobs or [])[1:]
        rows.append(
            {
                "adapter": name,
                "prompt": ids,
                "ids": list(answer.token_ids),
                "cached": output.num_cached_tokens,
                "logprobs": [p[t].logprob for p, t in zip(answer.logprobs, answer.token_ids, strict=True)],
                "prompt_logprobs": [p[t].logprob for p, t in zip(later, ids[1:], strict=False)],
            }
        )
    return {"rows": rows, "trace": gate.TRACE}


def main() -> None:
    folder, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    if options.pop("asynchronous", False):
        schedule_asynchronously()
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    llm = LLM(model=str(folder / "base"), **ENGINE | options)
    config = llm.llm_engine.vllm_config
    names = ["adapter", "two", "plain"]
    loras: dict[str, Any] = {n: LoRARequest(n, i, str(folder / n)) for i, n in enumerate(names, 1)}
    loras["base"] = None

    def run(requests: list[tuple[list[int], str]], extra: list[Any] | None = None, **params: Any) -> dict[str, Any]:
        return generate(llm, [(ids, name, loras[name]) for ids, name in requests], extra, params)

    texts = prompts()
    alone = [(ids, "adapter") for ids in texts.values()]
    result: dict[str, Any] = {
        "v2": config.use_v2_model_runner,
        "asynchronous": config.scheduler_config.async_scheduling,
    }

    def note(part: str, found: dict[str, Any]) -> None:
        """Keep what a part gave, also if a later one fails."""
        result[part] = found
        result["metrics"] = {m.name: m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"}
        out.write_text(json.dumps(result))

    note("prompt", run(alone, max_tokens=1, prompt_logprobs=0))
    note("cached", run(alone, max_tokens=ANSWER))
    turn = [row["prompt"] + row["ids"] + texts["question"][:SECOND_TURN] for row in result["cached"]["rows"]]
    note("second_turn", run([(ids, "adapter") for ids in turn], max_tokens=8))
    llm.reset_prefix_cache()
    names = ("question", "in_guidance", "stray", "answered")
    note("mixed", run([(texts[n], a) for n in names for a in ("adapter", "two", "plain", "base")], max_tokens=24))
    llm.reset_prefix_cache()
    questions = [(ids, "adapter") for ids in dialogues(folder / "adapter")]
    pairs = [(question, mode) for question in questions for mode in [*MODES, None]]
    asked = [mode and {"steps": mode, "step_limit": 9} for _, mode in pairs]
    stop = {"stop_token_ids": [stop_id(folder / "adapter")], "ignore_eos": False}
    note("chains", run([question for question, _ in pairs], asked, max_tokens=40, **stop))
    llm.reset_prefix_cache()
    single = [(texts[name], "adapter") for name in ("in_analysis", "stray")]
    note("single", {"rows": [row for one in single for row in run([one], max_tokens=ANSWER)["rows"]]})


if __name__ == "__main__":
    main()
