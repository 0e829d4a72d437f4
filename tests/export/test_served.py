"""`axolotl mote export --format vllm`: a base with the marker rows, and the adapter with its own."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from kit import LINEARS, chain, save_adapter, tiny_model, tiny_mote
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_mote.cli.export import command
from axolotl_mote.export import export_served, served
from axolotl_mote.generation.loading import load_mote


def folders(path, tied=True, **options):
    model, tokenizer = tiny_mote(tied=tied, **options)
    tiny_model(tied=tied).save_pretrained(path / "base")
    return save_adapter(model, tokenizer, path / "adapter", path / "base")


@pytest.mark.parametrize("tied", [True, False])
def test_base_holds_the_rows_and_the_adapter_is_what_training_wrote(tmp_path, tied):
    adapter, out = folders(tmp_path, tied), tmp_path / "out"
    report = export_served(adapter, out)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, out / "adapter"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("MOTE", 4)
    assert config["base_model_name_or_path"] == str(out.resolve() / "base")
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    for table, part in ((base.get_input_embeddings(), "embed"), (base.get_output_embeddings(), "head")):
        names = [name for name in before if name.endswith("marker_rows.weight") and part in name]
        rows = before[names[0]] if names else before[next(n for n in before if "embed" in n)]
        assert torch.equal(table.weight[config["marker_ids"]], rows)
    assert report.verified
    assert report.largest_difference < 1e-4
    assert (report.rank, report.served_rank) == (16, 16)
    loaded, _ = load_mote(out / "adapter")
    original, _ = load_mote(adapter)
    row = torch.tensor([chain()])
    assert torch.equal(loaded(input_ids=row).logits, original(input_ids=row).logits)


def test_command_writes_prints_and_refuses(tmp_path):
    adapter, out = folders(tmp_path, r=3), tmp_path / "out"
    arguments = ["--adapter", str(adapter), "--output", str(out), "--format", "vllm"]
    refused = CliRunner().invoke(command, [*arguments, "--merge-shared"])
    assert refused.exit_code == 1
    assert "--merge-shared must be left out with --format vllm" in refused.output
    assert not out.exists()
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    assert "adapter of rank 12 (--max-lora-rank 16)" in done.output
    assert "largest difference from the step-routed model" in done.output
    again = CliRunner().invoke(command, [*arguments, "--overwrite", "--json", "--no-verify"])
    assert json.loads(again.stdout)["format"] == "vllm"
    assert json.loads((out / "export.json").read_text())["verified"] is False


@pytest.mark.parametrize(
    "layer",
    [
        "base_model.model.lm_head",
        "base_model.model.model.embed_tokens",
        "base_model.model.model.layers.0.mlp.experts.3.up_proj",
    ],
)
def test_layers_that_the_engine_cannot_gate_are_refused(layer):
    names = [f"base_model.model.model.layers.0.self_attn.{name}.lora_A.weight" for name in LINEARS]
    served.check_can_be_gated([*names, "base_model.model.model.embed_tokens.lora_marker_rows.weight"])
    with pytest.raises(ValueError, match=r"only layers that vLLM lets us gate; got experts on .*Train without them"):
        served.check_can_be_gated([*names, f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"])


def test_ranks_are_those_that_vllm_has():
    assert [served.served_rank(rank) for rank in (1, 48, 64, 80, 512)] == [1, 64, 64, 128, 512]
    with pytest.raises(ValueError, match=r"must be at most 512 for vLLM; got 513. Train with a smaller lora_r"):
        served.served_rank(513)


def test_rows_that_were_not_written_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "axolotl_mote.export.folders.bake_markers", lambda model, config, tensors: model.resize_token_embeddings(265)
    )
    with pytest.raises(ValueError, match="base must hold the adapter's marker rows"):
        export_served(folders(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
