"""Exported adapters are the gated model, one step at a time, without our package."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from kit import STEPS, save_adapter, smol_mote, tiny_model, tiny_mote
from safetensors.torch import load_file

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.export import api, build_adapter, export_adapter, plan_adapters
from axolotl_mote.export.verification import make_probes
from axolotl_mote.export.weights import shared_updates
from axolotl_mote.model.config import MoteConfig
from axolotl_mote.model.routing import step_ids_from_tokens

ROW = {
    "messages": [{"role": "user", "content": "How do I kill a Python process?"}],
    "analysis": "It is about computers.",
    "guidance": "Give the command.",
    "response": "Use kill with its number.",
    "check": "safe",
}

PLAIN_PEFT = """
import sys, torch
from itertools import groupby
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder, probe_file, out = sys.argv[1:]
probe = torch.load(probe_file)
model = AutoModelForCausalLM.from_pretrained(folder + "/base", dtype=torch.float32)
for name in probe["names"]:
    if name is None:
        continue
    path = folder + "/adapters/" + name
    if isinstance(model, PeftModel):
        model.load_adapter(path, adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, path, adapter_name=name)
model.eval()
cache, start, pieces = None, 0, []
with torch.no_grad():
    for step, run in groupby(probe["step_ids"].tolist()):
        n = len(list(run))
        model.set_adapter(probe["names"][step])
        result = model(input_ids=probe["ids"][None, start : start + n], past_key_values=cache, use_cache=True)
        cache, start = result.past_key_values, start + n
        pieces.append(result.logits[0])
assert not [m for m in sys.modules if m.startswith("axolotl_mote")]
torch.save(torch.cat(pieces), out)
"""


def tiny_folder(tmp_path: Path, steps=STEPS, tied=True, **options):
    """A base model folder and an adapter folder on it."""
    model, tokenizer = tiny_mote(steps, tied=tied, **options)
    tiny_model(tied=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return model, tokenizer, save_adapter(model, tokenizer, tmp_path / "adapter", tmp_path / "base")


def run_plain_peft(
    tmp_path: Path, folder: Path, model, tokenizer, steps
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of plain PEFT in a process that never imports our package, those of the gated model, and the step ids."""
    ids = ChainCodec(tokenizer, steps).encode_chain(ROW)["input_ids"]
    (probe,) = make_probes(model, model.peft_config["default"], [ids])
    torch.save({"ids": probe.ids, "step_ids": probe.step_ids, "names": ["question", *steps]}, tmp_path / "probe.pt")
    command = [sys.executable, "-c", PLAIN_PEFT, str(folder), str(tmp_path / "probe.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, timeout=300)
    return torch.load(tmp_path / "logits.pt"), probe.logits, probe.step_ids


@pytest.mark.parametrize(
    ("steps", "tied", "merge", "options"),
    [
        (STEPS, True, False, {}),
        (STEPS, False, True, {"expert_weight": 0.7}),
        ((*STEPS, "check"), False, False, {"r": 3, "question_routing": "mean"}),
        (("plan", "final"), True, False, {"question_routing": "shared"}),
    ],
)
def test_plain_peft_gives_the_gated_logits(tmp_path, steps, tied, merge, options):
    model, tokenizer, adapter = tiny_folder(tmp_path, steps, tied, **options)
    report = export_adapter(adapter, tmp_path / "out", merge_shared=merge)
    assert report.verified
    assert report.largest_difference < 1e-4
    row = ROW | {"plan": ROW["analysis"], "final": ROW["response"]}
    ids = ChainCodec(tokenizer, steps).encode_chain(row)["input_ids"]
    (probe,) = make_probes(model, model.peft_config["default"], [ids])
    assert set(probe.step_ids.tolist()) == set(range(len(steps) + 1))


def test_real_model_in_a_process_without_our_package(tmp_path, smollm2_dir):
    # About as large as trained experts; the rounding of float32 at logits of 40 grows with them.
    model, tokenizer = smol_mote(smollm2_dir, scale=0.02)
    adapter = save_adapter(model, tokenizer, tmp_path / "adapter", smollm2_dir)
    export_adapter(adapter, tmp_path / "out", verify=False)
    plain, whole, step_ids = run_plain_peft(tmp_path, tmp_path / "out", model, tokenizer, STEPS)
    assert plain.shape == whole.shape
    gated = gated_by_runs(model, ChainCodec(tokenizer, STEPS).encode_chain(ROW)["input_ids"])
    for step in range(4):
        at = step_ids == step
        print(f"step {step}: {(plain[at] - gated[at]).abs().max():.1e} against the gated model")
        # The question's adapter mixes all experts, with weights that float32 rounds.
        assert (plain[at] - gated[at]).abs().max() < (1e-4 if step else 2e-4), step
        # One forward over everything rounds in another order; logits reach 40 here.
        assert (plain[at] - whole[at]).abs().max() < 3e-4, step


@torch.no_grad()
def gated_by_runs(model, ids: list[int]) -> torch.Tensor:
    """Logits of the gated model, fed run by run of equal steps with its cache, as plain PEFT is."""
    tokens = torch.tensor([ids])
    step_ids = step_ids_from_tokens(tokens, model.peft_config["default"])
    cache, start, pieces = None, 0, []
    for _, run in groupby(step_ids[0].tolist()):
        part = slice(start, start + len(list(run)))
        result = model(input_ids=tokens[:, part], step_ids=step_ids[:, part], past_key_values=cache, use_cache=True)
        cache, start = result.past_key_values, part.stop
        pieces.append(result.logits[0])
    return torch.cat(pieces)


def test_ranks_and_what_is_on_disk(tmp_path):
    model, _, adapter = tiny_folder(tmp_path, r=8)
    report = export_adapter(adapter, tmp_path / "out", verify=False)
    assert {name: entry["rank"] for name, entry in report.adapters.items()} == {
        "question": 32,
        "analysis": 16,
        "guidance": 16,
        "response": 16,
    }
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapters", "base", "export.json"]
    config = json.loads((tmp_path / "out/adapters/analysis/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (16, 16)
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    rows = load_file(tmp_path / "out/base/model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape[0] == max(model.peft_config["default"].marker_ids) + 1
    assert json.loads((tmp_path / "out/base/config.json").read_text())["vocab_size"] == rows.shape[0]


def test_odd_ranks_are_padded_with_zeros():
    config = MoteConfig(r=3, lora_alpha=6, marker_ids=list(range(6)))
    plans = plan_adapters(config)
    assert [(p.rank, p.served_rank) for p in plans] == [(12, 16), (6, 8), (6, 8), (6, 8)]
    tensors = {"m.lora_A.weight": torch.randn(12, 5), "m.lora_B.weight": torch.randn(7, 12)}
    built = build_adapter(tensors, plans[1])
    assert built["m.lora_A.weight"].shape == (8, 5)
    assert not built["m.lora_A.weight"][6:].any()
    assert not built["m.lora_B.weight"][:, 6:].any()
    a, b = tensors["m.lora_A.weight"], tensors["m.lora_B.weight"]
    expected = 2 * (0.5 * b[:, :3] @ a[:3] + 0.5 * b[:, 9:] @ a[9:])
    torch.testing.assert_close(built["m.lora_B.weight"] @ built["m.lora_A.weight"], expected)


def test_merging_the_shared_expert_halves_the_rank():
    config = MoteConfig(r=8, lora_alpha=16, marker_ids=list(range(6)))
    assert [p.rank for p in plan_adapters(config, merge_shared=True)] == [24, 8, 8, 8]
    tensors = {"m.lora_A.weight": torch.randn(32, 5), "m.lora_B.weight": torch.randn(7, 32)}
    ((name, update),) = shared_updates(tensors, config)
    whole, parts = (build_adapter(tensors, plan_adapters(config, merge)[2]) for merge in (False, True))
    assert name == "m"
    torch.testing.assert_close(
        whole["m.lora_B.weight"] @ whole["m.lora_A.weight"],
        parts["m.lora_B.weight"] @ parts["m.lora_A.weight"] + update,
    )


def test_question_adapter_may_be_the_base_model_alone(tmp_path):
    _, _, adapter = tiny_folder(tmp_path, question_routing="shared")
    report = export_adapter(adapter, tmp_path / "out", merge_shared=True)
    assert report.adapters["question"]["rank"] == 0
    assert not (tmp_path / "out/adapters/question").exists()
    assert report.largest_difference < 1e-4


def test_rank_beyond_every_server_is_refused():
    config = MoteConfig(r=200, lora_alpha=16, marker_ids=list(range(6)))
    with pytest.raises(ValueError, match="rank of at most 512"):
        _ = plan_adapters(config)[0].served_rank


def test_half_precision_base_is_verified_in_float32(tmp_path):
    _, _, adapter = tiny_folder(tmp_path)
    report = export_adapter(adapter, tmp_path / "out", dtype="bfloat16")
    assert report.dtype == "bfloat16"
    assert report.largest_difference < 1e-4
    assert load_file(tmp_path / "out/base/model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_drift_of_re_prefilling_is_measured(tmp_path):
    _, _, adapter = tiny_folder(tmp_path)
    report = export_adapter(adapter, tmp_path / "out")
    drift = report.adapters["response"]["drift"]
    assert drift["mean_kl"] > 1e-4
    assert 0 <= drift["same_top"] <= 1
    assert drift["tokens"] > 0
    assert report.adapters["question"]["drift"] is None


def test_a_wrong_export_is_not_written(tmp_path, monkeypatch):
    from axolotl_mote.export import weights

    def swapped(config):
        return weights.gate_table(config)[:, :: config.r].flip(0)

    _, _, adapter = tiny_folder(tmp_path)
    monkeypatch.setattr(weights, "block_weights", swapped)
    with pytest.raises(ValueError, match="must give the step-routed model's logits"):
        export_adapter(adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_existing_output_is_kept(tmp_path):
    _, _, adapter = tiny_folder(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="must not exist yet"):
        export_adapter(adapter, tmp_path / "out")
    for _ in range(2):
        export_adapter(adapter, tmp_path / "out", overwrite=True, verify=False)
        assert (tmp_path / "out/export.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize(
    ("output", "message"), [("adapter", "must not hold"), (".", "must not hold"), ("mine", "only")]
)
def test_overwrite_replaces_nothing_but_an_export(tmp_path, output, message):
    _, _, adapter = tiny_folder(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        export_adapter(adapter, tmp_path / output, overwrite=True, verify=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_adapters_name_their_base_from_anywhere(tmp_path, monkeypatch):
    _, _, adapter = tiny_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    export_adapter(adapter, "out", verify=False)
    named = json.loads((tmp_path / "out/adapters/response/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "out/base")


def test_adapters_only(tmp_path):
    _, _, adapter = tiny_folder(tmp_path)
    report = export_adapter(adapter, tmp_path / "out", write_base_model=False)
    assert report.verified
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapters", "export.json"]


def test_a_base_that_cannot_be_loaded_again_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of another size than the configuration says, as transformers leaves some families."""
    *_, adapter = tiny_folder(tmp_path)
    write_base = api.write_base

    def forget_the_size(folder: Path, *args: object) -> None:
        write_base(folder, *args)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 259}))

    monkeypatch.setattr(api, "write_base", forget_the_size)
    with pytest.raises(ValueError, match=r"exported base must load again in its new size; got .* Use load_mote"):
        export_adapter(adapter, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
