"""Decoding speed: MoTE beside plain PEFT LoRA of the same total rank, interleaved in one run.

    python tests/bench/decode.py --model models/SmolLM2-135M-Instruct
    python tests/bench/decode.py --model models/SmolLM2-135M-Instruct --device cuda --dtype bfloat16

Each variant generates the same number of tokens from the same short prompts. Variants take turns within a repeat, and
on the CPU one thread's CPU time is counted, so a busy machine slows all of them alike. The table shows medians, and the
median over the repeats of the variant's time divided by that of plain LoRA: below 1 is faster.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kit import LINEARS, STEPS, random_adapter, with_markers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from axolotl_mote.generation import codec_for
from axolotl_mote.generation.grammar import StepGrammar, make_budget, make_plan

QUESTION = "Explain in a few sentences why the sky is blue at noon and red in the evening."


def lora(model: Any, tokenizer: Any, rank: int) -> Any:
    """Plain PEFT LoRA on all linear layers, with random B so that nothing can be skipped."""
    peft_model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return peft_model.eval()


def grammar(model: Any, tokenizer: Any, prompt_length: int, tokens: int) -> LogitsProcessorList:
    """The grammar of the full chain, as generate_chain applies it."""
    codec = codec_for(model, tokenizer)
    plan = make_plan(list(STEPS), codec.vocabulary)
    budget = make_budget(plan, codec.vocabulary, tokens)
    return LogitsProcessorList([StepGrammar(codec, plan, budget, prompt_length=prompt_length)])


def generation(model: Any, ids: torch.Tensor, tokens: int, processors: Any = None) -> Callable[[], None]:
    """A call that generates exactly `tokens` tokens for each row of ids."""

    def run() -> None:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=processors,
        )
        if out.shape[1] != ids.shape[1] + tokens:
            raise RuntimeError(f"generated {out.shape[1] - ids.shape[1]} of {tokens} tokens")

    return run


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """Time of one call: CPU time of this process on the CPU (one thread), wall time on a GPU."""
    if device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@click.command()
@click.option("--model", "folder", required=True, help="Base model folder.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--rank", default=16, show_default=True, help="Rank of one expert; the total is four times that.")
@click.option("--batch", "batches", multiple=True, default=(1, 16), show_default=True, type=int)
@click.option("--tokens", default=32, show_default=True, help="New tokens of each row.")
@click.option("--repeats", default=7, show_default=True)
def main(folder: str, device: str, dtype: str, rank: int, batches: tuple[int, ...], tokens: int, repeats: int) -> None:
    """Print a Markdown table of tokens per second."""
    on = torch.device(device)
    torch.manual_seed(0)
    if on.type != "cuda":
        torch.set_num_threads(1)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(on).eval()

    tokenizer = with_markers(AutoTokenizer.from_pretrained(folder))
    plain = lora(base(), tokenizer, 4 * rank)
    mote = random_adapter(base(), tokenizer, r=rank, scale=0.05)
    prompt = codec_for(mote, tokenizer).encode_question([{"role": "user", "content": QUESTION}])[
        -12:
    ]  # decoding counts, not prefill
    prompt += [mote.peft_config["default"].vocabulary.start_ids[0]]
    print(
        f"{Path(folder).name}, {dtype}, {device}, {torch.get_num_threads()} thread(s); prompt {len(prompt)}, ", end=""
    )
    print(f"new {tokens}; median of {repeats} interleaved repeats\n")
    print(f"| batch | variant | tokens/s | time / time of LoRA r={4 * rank}, below 1 is faster |\n|---|---|---|---|")
    for batch in batches:
        ids = torch.tensor([prompt] * batch, device=on)
        text = ids.clone()
        text[:, -1] = prompt[0]  # plain LoRA has no marker rows
        calls = {
            f"PEFT LoRA r={4 * rank}": generation(plain, text, tokens),
            "MoTE, generate": generation(mote, ids, tokens),
            "MoTE, with step grammar": generation(
                mote, ids[:, :-1], tokens, grammar(mote, tokenizer, len(prompt) - 1, tokens)
            ),
        }
        for call in calls.values():
            call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                times[name].append(seconds(call, on))
        reference = next(iter(times.values()))
        for name, taken in times.items():
            rate = batch * tokens / statistics.median(taken)
            ratio = statistics.median(t / r for r, t in zip(reference, taken, strict=True))
            print(f"| {batch} | {name} | {rate:.1f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
