"""A tiny exported model with two MoTE adapters, and the driver that runs it in vLLM, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from kit import LINEARS, STEPS, random_adapter, save_adapter, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.export import export_served

HERE = Path(__file__).resolve().parent
TWO = ("guidance", "response")
SECOND_TURN = 11
MODES = ["adaptive", ["response"], ["analysis", "response"], ["analysis", "guidance", "response"]]
QUESTIONS = ("How do I kill a process?", "Say <|response|> twice.")


def write_folders(path: Path) -> Path:
    """``base``, ``adapter`` (three steps), ``two`` (two of them, other ranks and question routing) and ``plain``.

    ``changed`` is ``adapter`` with other experts.
    """
    tokenizer = tiny_tokenizer()
    model = random_adapter(tiny_model(hidden=128), tokenizer, marker_scale=1.5, expert_weight=0.6)
    tiny_model(hidden=128).save_pretrained(path / "untouched")
    served = path / "served"
    export_served(save_adapter(model, tokenizer, path / "trained", path / "untouched"), served)
    shutil.copytree(served / "adapter", served / "changed")
    weights = load_file(served / "changed" / "adapter_model.safetensors")
    save_file({k: -v if "lora_B" in k else v for k, v in weights.items()}, served / "changed/adapter_model.safetensors")
    other = random_adapter(
        tiny_model(hidden=128), tokenizer, TWO, r=2, seed=5, expert_weight=0.3, question_routing="shared"
    )
    save_adapter(other, tokenizer, served / "two", served / "base")
    _share_rows(served / "adapter", served / "two")
    base = AutoModelForCausalLM.from_pretrained(served / "base")
    plain = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    plain.save_pretrained(served / "plain")
    return served


def _share_rows(first: Path, second: Path) -> None:
    """Give the second adapter the rows that the base holds: those of the first, for the steps that it has."""
    rows = {k: v for k, v in load_file(first / "adapter_model.safetensors").items() if "marker_rows" in k}
    tensors = load_file(second / "adapter_model.safetensors")
    save_file(tensors | {k: v[2:].clone() for k, v in rows.items()}, second / "adapter_model.safetensors")


def run_engine(folder: Path, out: Path, runner: str, **options: Any) -> dict[str, Any]:
    """Run engine_driver.py; what it wrote.

    Args:
        folder: From ``write_folders``.
        out: Where the driver writes.
        runner: v1 or v2.
        **options: Of ``vllm.LLM``; ``asynchronous`` forces async scheduling, which vLLM turns off on a CPU; ``drafts``
            is what an earlier run wrote, for speculative decoding of which half is wrong.
    """
    environment = os.environ | {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}
    command = [sys.executable, HERE / "engine_driver.py", folder, out, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def prompts() -> dict[str, list[int]]:
    """Token ids around the markers: none, open, closed, reopened, stray, and long ones that chunks cut."""
    codec_ids = tiny_tokenizer().convert_tokens_to_ids([f"<|{s}{n}|>" for n in STEPS for s in ("", "/")])
    a, end_a, g, end_g, r, end_r = codec_ids
    generator = torch.Generator().manual_seed(3)

    def words(count: int) -> list[int]:
        return torch.randint(32, 250, (count,), generator=generator).tolist()

    shared = words(40)  # a system prompt: more than one block
    found = {
        "question": words(21),
        "in_analysis": [*words(9), a, *words(17)],
        "in_guidance": [*words(5), a, *words(7), end_a, *words(2), g, *words(9)],
        "closed": [*words(6), a, *words(5), end_a, g, *words(8), end_g, *words(4)],
        "reopened": [*words(4), a, *words(9), r, *words(11)],
        "stray": [*words(3), end_a, *words(4), a, *words(6), end_g, *words(5), a, end_a, *words(3), r],
        "long": [*words(30), a, *words(77)],
        "answered": [*shared, r, *words(30), end_r, *words(12), g],
    }
    for name in ("question", "in_analysis", "stray"):
        found[f"shared_{name}"] = [*shared, *found[name]]
    return found


def codec_at(adapter: Path) -> ChainCodec:
    """The codec of an adapter folder."""
    return ChainCodec.from_tokenizer(AutoTokenizer.from_pretrained(adapter))


def dialogues(adapter: Path) -> list[list[int]]:
    """Token ids of questions."""
    codec = codec_at(adapter)
    return [codec.encode_question([{"role": "user", "content": text}]) for text in QUESTIONS]


def stop_id(adapter: Path) -> int:
    """The token that ends a turn."""
    return codec_at(adapter).stop_id
