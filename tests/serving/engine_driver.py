"""Run prompts through vLLM and write what came out; test_engine.py judges it. Arguments: FOLDER OUT OPTIONS."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import conftest  # noqa: E402, F401  (prepares Triton and the environment)
from serving_kit import MODES, SECOND_TURN, codec_at, dialogues, prompts, stop_id  # noqa: E402

from axolotl_mote.serving import gate  # noqa: E402

ANSWER = 12
MIXED = ("question", "in_guidance", "stray", "answered")
DRAFTS: dict[str, Any] = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
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
    "max_loras": 5,
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


def draft_half_wrong(sequences: list[list[int]], markers: list[int]) -> None:
    """Draft what the model is known to say, every other time with a marker or a random token at a random place.

    Args:
        sequences: Prompts with their answers.
        markers: Ids of all markers.
    """
    import torch
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

    count = DRAFTS["num_speculative_tokens"]
    chance = random.Random(0)

    def drafts_after(tokens: list[int]) -> list[int]:
        known = [s[len(tokens) :] for s in sequences if len(s) > len(tokens) and s[: len(tokens)] == tokens]
        drafts = [*(chance.choice(known) if known else []), *chance.choices(markers, k=count)][:count]
        if chance.random() < 0.5:
            drafts[chance.randrange(count)] = chance.choice([*markers, chance.randint(32, 250)])
        return drafts

    def propose_on_v1(self: Any, n: int, sampled: Any, lengths: Any, token_ids: Any, *_: Any, **__: Any) -> Any:
        rows = zip(sampled, lengths, token_ids, strict=False)
        return [drafts_after(ids[:length].tolist())[:n] if new else [] for new, length, ids in rows]

    def propose_on_v2(self: Any, input_batch: Any, *_: Any, **__: Any) -> Any:
        for row, slot in enumerate(input_batch.idx_mapping_np[: input_batch.num_reqs]):
            length = int(self.req_states.total_len.gpu[slot])
            tokens = self.req_states.all_token_ids.gpu[slot, :length].tolist()
            self.drafts[row] = torch.tensor(drafts_after(tokens))
        return self.drafts[: input_batch.num_reqs]

    NgramProposer.propose, NgramGPUSpeculator.propose = propose_on_v1, propose_on_v2


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


def make_engine(folder: Path, options: dict[str, Any]) -> Any:
    """The engine, with what ``run_engine`` was asked for."""
    options = ENGINE | options
    if options.pop("asynchronous", False):
        schedule_asynchronously()
    if drafts := options.pop("drafts", None):
        options |= {"speculative_config": DRAFTS, "max_num_seqs": 7}  # vLLM wants room for all drafts in one forward
        if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0":
            options["logits_processors"] = None  # vLLM has none on V1 beside drafts
    from vllm import LLM

    llm = LLM(model=str(folder / "base"), **options)
    if drafts:
        parts = [part for part in json.loads(Path(drafts).read_text()).values() if isinstance(part, dict)]
        rows = [row["prompt"] + row["ids"] for part in parts for row in part.get("rows", [])]
        draft_half_wrong(rows, list(codec_at(folder / "adapter").vocabulary.marker_ids))
    return llm


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    llm = make_engine(folder, json.loads(sys.argv[3]))
    from vllm.lora.request import LoRARequest

    config = llm.llm_engine.vllm_config
    swapped = out.with_suffix(".adapter")
    places = [folder / "adapter", folder / "two", folder / "plain", swapped]
    loras: dict[str, Any] = {path.name: LoRARequest(path.name, n, str(path)) for n, path in enumerate(places, 1)}
    loras |= {"base": None, "changed": loras[swapped.name]}

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
        result["metrics"] = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        out.write_text(json.dumps(result))

    note("prompt", run(alone, max_tokens=1, prompt_logprobs=0))
    note("cached", run(alone, max_tokens=ANSWER))
    turn = [row["prompt"] + row["ids"] + texts["question"][:SECOND_TURN] for row in result["cached"]["rows"]]
    note("second_turn", run([(ids, "adapter") for ids in turn], max_tokens=8))
    llm.reset_prefix_cache()
    note("mixed", run([(texts[n], a) for n in MIXED for a in ("adapter", "two", "plain", "base")], max_tokens=24))
    llm.reset_prefix_cache()
    if config.model_config.logits_processors:
        questions = [(ids, "adapter") for ids in dialogues(folder / "adapter")]
        pairs = [(question, mode) for question in questions for mode in [*MODES, None]]
        asked = [mode and {"steps": mode, "step_limit": 9} for _, mode in pairs]
        stop = {"stop_token_ids": [stop_id(folder / "adapter")], "ignore_eos": False}
        note("chains", run([question for question, _ in pairs], asked, max_tokens=40, **stop))
    llm.reset_prefix_cache()
    single = [(texts[name], "adapter") for name in ("in_analysis", "stray")]
    note("single", {"rows": [row for one in single for row in run([one], max_tokens=ANSWER)["rows"]]})

    shutil.copytree(folder / "adapter", swapped)
    long = [(texts[name], "changed") for name in ("long", "answered")]
    llm.llm_engine.add_lora(loras["changed"])
    run(long, max_tokens=1)
    shutil.copytree(folder / "changed", swapped, dirs_exist_ok=True)
    llm.llm_engine.add_lora(LoRARequest(swapped.name, len(places), str(swapped), load_inplace=True))
    note("replaced", run(long, max_tokens=ANSWER))


if __name__ == "__main__":
    main()
