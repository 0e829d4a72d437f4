"""`axolotl preprocess`, `train` and `evaluate` in one process; what they print, save and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from axolotl_mote.training.checkpoints import checkpoint_fault

from .compare import largest_difference


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logged(log: str, key: str) -> list[float]:
    """Every value that was logged under a key, by the trainer ('key': 'value') or by evaluate (key: value)."""
    return [float(value) for value in re.findall(rf"(?:'|\] ){re.escape(key)}'?: '?([-+\w.]+)", log)]


# --- train ----------------------------------------------------------------------------------------------------------


@pytest.mark.needs("reference")
def test_smoke_train(runs: Any, workshop: Any) -> None:
    adapter = runs.get("reference")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "MOTE"
    assert config["steps"] == ["analysis", "guidance", "response"]
    assert config["marker_ids"] == list(range(49152, 49158))
    log = (workshop.folder / "reference" / "train.log").read_text(encoding="utf-8")
    losses = logged(log, "loss")
    assert len(losses) == 6
    assert all(10 < loss < 11.5 for loss in losses)  # ln(49152) = 10.80 for a random model
    assert losses[-1] < losses[0]
    for step in ("analysis", "guidance", "response"):
        assert len(logged(log, f"loss/{step}")) >= 3
        assert sum(logged(log, f"tokens/{step}")) > 100
    assert logged(log, "loss") != logged(log, "loss/response")


@pytest.mark.needs("reference")
def test_the_adapter_holds_lora_and_marker_rows_only(runs: Any) -> None:
    tensors = adapter_of(runs.get("reference"))
    rows = {name: tensor.shape for name, tensor in tensors.items() if "lora_marker_rows" in name}
    assert sorted(rows) == [
        "base_model.model.lm_head.lora_marker_rows.weight",
        "base_model.model.model.embed_tokens.lora_marker_rows.weight",
    ]
    assert set(rows.values()) == {(6, 64)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in rows}
    assert len(rest) == 2 * 2 * 7  # A and B, two layers of seven linear modules
    for name, tensor in rest.items():
        assert re.search(r"layers\.\d\..*_proj\.lora_[AB]\.weight$", name)
        assert tensor.shape[0 if "lora_A" in name else 1] == 16  # four experts of rank 4
        assert tensor.dtype == torch.float32
        if "lora_B" in name:  # B starts as zero: every expert has learned something
            assert all(float(block.norm()) > 0 for block in tensor.split(4, dim=1)), name


@pytest.mark.needs("reference")
def test_the_adapter_loads_with_peft(runs: Any, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import axolotl_mote  # noqa: F401

    adapter = runs.get("reference")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = torch.tensor([[1, 500, 600, 49152, 700, 49153, 49156, 800, 49157, 2]])
    question = base(tokens[:, :3]).logits
    model = PeftModel.from_pretrained(base, adapter).eval()
    loaded = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    for name, tensor in adapter_of(adapter).items():
        assert torch.equal(loaded[re.sub(r"\.weight$", ".default.weight", name)], tensor), name
    logits = model(tokens).logits
    assert logits.shape[-1] == 49158
    assert torch.isfinite(logits[..., 49152:]).all()
    assert not torch.allclose(logits[:, :3, :49152], question, atol=1e-3)


@pytest.mark.needs("reference")
def test_the_adapter_has_a_model_card(runs: Any, workshop: Any) -> None:
    card = (runs.get("reference") / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card.split("---\n")[1]
    assert "The steps are analysis, guidance, response" in " ".join(card.split())
    assert "| rank of one expert | 4 (whole adapter: 16) |" in card
    assert f"| `{workshop.chains}` | unknown: fill in |" in card
    assert "load_mote(" in card
    assert not re.search("[{%]{2}", card.split("```bibtex")[0])


@pytest.mark.needs("reference", "checkpointed", "checkpointed_reentrant")
@pytest.mark.parametrize("kind", ["checkpointed", "checkpointed_reentrant"])
def test_gradient_checkpointing_changes_nothing(runs: Any, kind: str) -> None:
    assert largest_difference(runs.get("reference"), runs.get(kind)) < 1e-5


@pytest.mark.needs("packed")
def test_sample_packing(runs: Any, workshop: Any) -> None:
    adapter = runs.get("packed")
    log = (workshop.folder / "packed" / "train.log").read_text(encoding="utf-8")
    assert len(logged(log, "loss")) == 2
    assert all(10 < loss < 11.5 for loss in logged(log, "loss"))
    assert logged(log, "tokens/analysis")[0] > 0
    assert len(adapter_of(adapter)) == 30


@pytest.mark.needs("four_bit")
def test_a_4bit_base_trains(runs: Any) -> None:
    """What is not quantized is refused at start; tests/model/test_adapter.py looks at the layers."""
    (loss,) = logged(runs.get("four_bit").ok().log, "loss")
    assert 10 < loss < 11.5


# --- evaluate and preprocess ----------------------------------------------------------------------------------------


@pytest.mark.needs("reference", "evaluated")
def test_evaluate(runs: Any) -> None:
    log = runs.get("evaluated").ok().log
    (loss,) = set(logged(log, "eval_loss"))
    names = ("analysis", "guidance", "response")
    steps = [logged(log, f"eval_loss/{step}")[0] for step in names]
    tokens = [logged(log, f"eval_tokens/{step}")[0] for step in names]
    assert tokens[2] > tokens[1] > 0
    # The loss is the mean over all tokens. Beside the steps only the end of turn counts, one token for each chain.
    total, ends = sum(tokens), 12
    of_steps = sum(mean * count for mean, count in zip(steps, tokens, strict=True))
    end_of_turn = (loss * (total + ends) - of_steps) / ends
    assert 9 < end_of_turn < 11.5  # ln(49152) = 10.80 for a random model
    assert 9 < min(steps) < max(steps) < 10.9


@pytest.mark.needs("lora", "lora_evaluated")
def test_plain_lora_is_a_baseline_on_the_same_chains(runs: Any, workshop: Any) -> None:
    adapter = runs.get("lora")
    assert json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "LORA"
    log = (workshop.folder / "lora" / "train.log").read_text(encoding="utf-8")
    assert len(logged(log, "loss")) == 6
    assert sum(logged(log, "tokens/analysis")) > 100
    log = runs.get("lora_evaluated").ok().log
    assert 9 < logged(log, "eval_loss")[0] < 10.9
    assert logged(log, "eval_loss/guidance")


@pytest.mark.needs("lora", "lora_again")
def test_the_baseline_is_reproducible(runs: Any) -> None:
    """The rows of its marker tokens too, which axolotl draws before it seeds."""
    assert largest_difference(runs.get("lora"), runs.get("lora_again")) == 0


@pytest.mark.needs("preprocessed")
def test_preprocess_shows_the_routing(runs: Any) -> None:
    log = runs.get("preprocessed").ok().log
    assert "kept 12 of 12 chains; chain forms of all:" in log
    assert "routing: question" in re.sub(r"\x1b\[[\d;]*m", "", log)
    # Through a pipe axolotl (colorama) removes the colors; tests/training/test_dataset.py looks at them.
    assert re.search(r"<\|analysis\|>.*<\|guidance\|>.*<\|response\|>", log)


@pytest.mark.needs("reference", "answered")
def test_axolotl_inference_answers_through_the_chat_template(runs: Any) -> None:
    log = runs.get("answered").ok().log
    assert "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n" in log


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.needs("inference_refused", "merge_refused", "kernel_refused", "unwritable", "bad_rows")
@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("inference_refused", r"lora_model_dir must name a trained adapter for inference with adapter: mote; got none"),
        ("merge_refused", r"merge_lora must not be set with adapter: mote; got True\. .*Use `axolotl mote export`"),
        ("kernel_refused", r"lora_mlp_kernel must not be set with adapter: mote; got True\. The fused kernels bypass"),
        ("unwritable", r"output_dir must be writable; got Not a directory at .*chains\.jsonl\. Set another folder\."),
        (
            "bad_rows",
            r"bad\.jsonl holds 4 faults; nothing was trained(?s:.)*row 2: id must be unique(?s:.)*row 4: the line",
        ),
    ],
)
def test_refused(runs: Any, run: str, message: str) -> None:
    result = runs.get(run)
    assert result.returncode != 0
    assert re.search(message, result.log), result.log[-3000:]


@pytest.mark.needs("diverged")
def test_weights_that_are_no_numbers_are_not_saved(runs: Any, workshop: Any) -> None:
    result = runs.get("diverged")
    assert result.returncode != 0
    assert "learning_rate must keep the weights finite; got nan or inf" in result.log
    saved = list(workshop.output("diverged").rglob("adapter_model.safetensors"))
    assert workshop.output("diverged") / "adapter_model.safetensors" not in saved
    for path in saved:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path


@pytest.mark.needs("resumed_before_a_torn_checkpoint", "reference")
def test_a_torn_checkpoint_is_not_resumed_from(runs: Any, workshop: Any) -> None:
    log = runs.get("resumed_before_a_torn_checkpoint").log
    assert "checkpoint-4 is not resumed from: optimizer.pt is torn." in log
    assert log.count("'loss':") == 4
    assert largest_difference(workshop.output("torn"), runs.get("reference")) < 1e-5


@pytest.mark.needs("interrupted", "reference")
def test_a_run_goes_on_whatever_save_it_was_killed_in(runs: Any, workshop: Any) -> None:
    logs = runs.get("interrupted")
    assert "checkpoint-4 is not resumed from: trainer_state.json is missing." in logs[1]
    assert [log.count("'loss':") for log in logs] == [4, 4, 0]
    assert largest_difference(workshop.output("interrupted"), runs.get("reference")) < 1e-5


@pytest.mark.needs("full")
def test_a_full_disk_is_named_and_leaves_the_last_checkpoint_whole(runs: Any, workshop: Any) -> None:
    result, out = runs.get("full"), workshop.output("full")
    assert result.returncode != 0
    assert "output_dir must have room for what training saves; got " in result.log
    assert f" at {out}/checkpoint-2. Free some, and go on from the last whole checkpoint" in result.log
    assert checkpoint_fault(out / "checkpoint-1") is None
    assert checkpoint_fault(out / "checkpoint-2") == "trainer_state.json is missing"
    assert not (out / "adapter_model.safetensors").exists()
