"""Separate models: what the generator writes equals switching adapters by hand, without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kit
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from separate import generate_separate, load_separate

from axolotl_mote.chain.codec import ChainCodec

STEPS = ("analysis", "guidance", "response")
QUESTIONS = [[{"role": "user", "content": text}] for text in ("Hi?", "What is 1 + 1? Ünïcode ✓", "<|response|>")]
LIMIT = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("separate")
    model, tokenizer = kit.tiny_model(vocab_size=320), kit.tiny_tokenizer()
    model.save_pretrained(root / "base")
    for number, step in enumerate(STEPS):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=kit.LINEARS, task_type="CAUSAL_LM")
        peft_model = get_peft_model(kit.tiny_model(vocab_size=320), config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        kit.save_adapter(peft_model, tokenizer, root / step, root / "base")
    return {step: root / step for step in STEPS}


@torch.no_grad()
def by_hand(model: PeftModel, codec: ChainCodec, question: Any, steps: list[str]) -> list[int]:
    """Greedy tokens, one full forward each; a step opens with its start marker and is closed at the limit."""
    vocabulary, written = codec.vocabulary, []
    prompt = codec.encode_question(question)
    starts, ends = vocabulary.start_ids, vocabulary.end_ids
    for step in steps:
        number = vocabulary.step_id(step) - 1
        model.set_adapter(step)
        part = [starts[number]]
        while part[-1] != ends[number]:
            logits = model(input_ids=torch.tensor([prompt + written + part])).logits[0, -1]
            allowed = torch.full_like(logits, float("-inf"))
            text = [i for i in range(259) if i not in codec.tokenizer.all_special_ids]
            allowed[text if len(part) == 1 else [*text, ends[number]]] = 0
            part.append(ends[number] if len(part) == LIMIT - 1 else int((logits + allowed).argmax()))
        written += part
    return written


@pytest.mark.parametrize("steps", [["response"], ["analysis", "response"], list(STEPS)])
def test_generator_equals_switching_by_hand(folders: dict[str, Path], steps: list[str]) -> None:
    model, codec = load_separate(folders, device="cpu")
    chains = generate_separate(model, codec, QUESTIONS, steps, LIMIT, batch_size=2)
    assert [list(chain.steps) for chain in chains] == [steps] * len(QUESTIONS)
    assert all(chain.valid for chain in chains)
    for chain, question in zip(chains, QUESTIONS, strict=True):
        assert list(chain.token_ids) == by_hand(model, codec, question, steps)


def test_adapters_differ(folders: dict[str, Path]) -> None:
    """Else the test above would pass with one adapter for all."""
    model, codec = load_separate(folders, device="cpu")
    prompt = torch.tensor([codec.encode_question(QUESTIONS[0])])
    logits = []
    for step in STEPS:
        model.set_adapter(step)
        with torch.no_grad():
            logits.append(model(input_ids=prompt).logits)
    assert (logits[0] - logits[1]).abs().max() > 0.1
    assert (logits[1] - logits[2]).abs().max() > 0.1


def test_steps_must_be_known(folders: dict[str, Path]) -> None:
    model, codec = load_separate(folders, device="cpu")
    with pytest.raises(ValueError, match="nonsense"):
        generate_separate(model, codec, QUESTIONS, ["nonsense"])
