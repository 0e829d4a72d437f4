"""Serving a real model: exactness on both runners, and speed beside a plain LoRA of the same rank.

    python tests/bench/serving.py prepare models/SmolLM2-135M-Instruct outputs/serving
    python tests/bench/serving.py check outputs/serving --runner v2
    python tests/bench/serving.py speed outputs/serving

`prepare` writes an exported folder with random experts of rank 16, and the same tensors as a plain LoRA of rank 64.
`check` is `axolotl-mote serve --check`; without a GPU, V2 runs under Triton's interpreter. `speed` holds two engines,
one with the plugin and the MoTE adapter, one without either and with the plain LoRA. They take turns within a round; on
the CPU, CPU time of the engine's process counts. vLLM's LoRA on a CPU copies the weights once per token, of which the
output head has most: prompts are short there, and the head is left out.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / "serving"), str(TESTS)]

PROMPT = 32 if torch.cuda.is_available() else 4
ON_CPU = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
CPU_FLAGS = ("--max-model-len", "512", "--max-num-seqs", "32", "--block-size", "32", "--enforce-eager")
RESULTS = Path("outputs/gpu/serving.json")
VARIANTS = ("plain LoRA", "MoTE", "MoTE, with step grammar")


@click.group()
def main() -> None:
    """Serving a real model."""


@main.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--rank", default=16, show_default=True, help="Rank of one expert.")
def prepare(model: Path, folder: Path, rank: int) -> None:
    """Write FOLDER/served and FOLDER/plain for a base model."""
    from kit import save_adapter, smol_mote
    from safetensors.torch import load_file, save_file

    from axolotl_mote.export import export_served

    if (folder / "plain").exists():
        return
    mote, tokenizer = smol_mote(model, r=rank)
    shutil.rmtree(folder, ignore_errors=True)
    export_served(save_adapter(mote, tokenizer, folder / "trained", model), folder / "served")
    scratch, adapter = folder / "plain.part", folder / "served" / "adapter"
    scratch.mkdir(parents=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "marker_rows" not in k}, scratch / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    total = next(v.shape[0] for k, v in weights.items() if k.endswith("lora_A.weight"))
    kept = {key: config[key] for key in ("target_modules", "lora_dropout", "bias", "base_model_name_or_path")}
    plain = kept | {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": total, "lora_alpha": total}
    (scratch / "adapter_config.json").write_text(json.dumps(plain))
    scratch.rename(folder / "plain")


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--runner", default="v1", type=click.Choice(["v1", "v2"]))
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def check(folder: Path, runner: str, flags: tuple[str, ...]) -> None:
    """Run `axolotl-mote serve --check` on FOLDER/served with one runner; in float32 unless FLAGS say otherwise."""
    from axolotl_mote.cli.serve import command

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "v2"))
    if not any(flag.startswith("--dtype") for flag in flags):
        flags = ("--dtype", "float32", *flags)
    if not torch.cuda.is_available():
        flags = (*flags, *CPU_FLAGS)
        os.environ["PYTHONPATH"] = str(TESTS / "serving" / "interpreted")  # every process of the server sets itself up
    command(["--check", str(folder / "served"), *flags], standalone_mode=True)


def _engine(folder: Path, is_mote: bool) -> Any:
    """An engine and the LoRA that its requests name."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    place = folder / "served" / "adapter" if is_mote else folder / "plain"
    llm = LLM(
        model=str(folder / "served" / "base"),
        max_model_len=512,
        max_num_seqs=16,
        enable_lora=True,
        max_lora_rank=64,
        max_loras=2,
        enable_prefix_caching=False,
        logits_processors=["axolotl_mote.serving.logits:StepProcessor"] if is_mote else None,
        **({} if torch.cuda.is_available() else ON_CPU),
    )
    return llm, LoRARequest("one", 1, str(place))


@main.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("is_mote", type=bool)
def work(folder: Path, is_mote: bool) -> None:
    """Time generations that are asked for on standard input, one JSON object a line."""
    from vllm import SamplingParams

    llm, lora = _engine(folder, is_mote)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints

    def say(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    say("ready")
    for line in sys.stdin:
        asked = json.loads(line)
        chance = random.Random(asked["seed"])
        prompts = [
            {"prompt_token_ids": [chance.randint(1000, 20000) for _ in range(PROMPT)]} for _ in range(asked["batch"])
        ]
        extra = {"steps": ["analysis", "guidance", "response"]} if asked["grammar"] else None
        params = SamplingParams(
            temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False, extra_args=extra
        )
        begin = clock()
        outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
        took = clock() - begin
        say({"seconds": took, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)})


class Worker:
    """An engine in a process of its own."""

    def __init__(self, folder: Path, is_mote: bool) -> None:
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
        if not is_mote:
            environment["VLLM_PLUGINS"] = "none"
        command = [sys.executable, __file__, "work", str(folder), str(is_mote)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._read()

    def _read(self) -> Any:
        assert self.process.stdout
        while line := self.process.stdout.readline():
            if line.startswith(("{", '"ready"')):
                return json.loads(line)
        raise RuntimeError(f"the engine ended with status {self.process.wait()}")

    def time(self, **asked: Any) -> dict[str, Any]:
        """Generate, and say how long it took."""
        assert self.process.stdin
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        found: dict[str, Any] = self._read()
        return found

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--batch", "batches", multiple=True, default=(1, 16), show_default=True)
@click.option("--tokens", default=48, show_default=True, help="New tokens of each request.")
@click.option("--rounds", default=9, show_default=True)
def speed(folder: Path, batches: tuple[int, ...], tokens: int, rounds: int) -> None:
    """Print time per token beside that of a plain LoRA, with a bootstrap interval over rounds.

    On a GPU the figures are also written to outputs/gpu/serving.json.
    """
    workers = {False: Worker(folder, False), True: Worker(folder, True)}
    rows = []
    try:
        for batch in batches:
            times: dict[str, list[float]] = {name: [] for name in VARIANTS}
            for number in range(-1, rounds):  # the first warms up
                for name in random.Random(number).sample(VARIANTS, len(VARIANTS)):
                    found = workers[name != VARIANTS[0]].time(
                        batch=batch, tokens=tokens, seed=number, grammar=name == VARIANTS[2]
                    )
                    if number >= 0:
                        times[name].append(found["seconds"] / found["tokens"])
                click.echo(f"{batch} at once: round {number + 1} of {rounds}", err=True)
            rows += [_row(batch, name, times[name], times[VARIANTS[0]]) for name in VARIANTS]
    finally:
        for worker in workers.values():
            worker.close()
    print("| requests at once | variant | ms per token | time / plain LoRA of rank 64 | 95 % |\n|---|---|---|---|---|")
    for row in rows:
        low, high = row["interval"]
        print(f"| {row['batch']} | {row['variant']} | {row['ms']:.2f} | {row['ratio']:.3f} | {low:.3f} to {high:.3f} |")
    if torch.cuda.is_available():
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


def _row(batch: int, name: str, times: list[float], plain: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(times, plain, strict=True)]
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "batch": batch,
        "variant": name,
        "ms": 1000 * statistics.median(times),
        "ratio": statistics.median(ratios),
        "interval": (medians[50], medians[1949]),
    }


if __name__ == "__main__":
    main()
