"""The families that differ most, in every run of the tests; `make families` examines all that transformers knows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from matrix import FAULTS, PAGE, RECORD, examine, page, record
from oracles import TOLERANCE, Outcome, judge
from tiny import OVERRIDES, tiny_model

from axolotl_mote.model.routing import gate_table

EXAMINED = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",  # fused experts
    "gemma2",  # soft caps, sliding windows
    "gemma3_text",
    "mistral",
    "phi3",  # fused projections
    "gpt_neox",  # other names for everything
    "deepseek_v3",  # latent attention
    "granite",  # scaled logits
    "recurrent_gemma",  # a state
]


@pytest.mark.parametrize("family", EXAMINED)
def test_every_cell_is_right_or_refused(family: str) -> None:
    cells = examine(family)
    faults = {name: cell for name, cell in cells.items() if cell.kind in (*FAULTS, "not built")}
    assert faults == {}
    if family == "llama":
        assert {name for name, cell in cells.items() if cell.kind != "right"} <= {"continued cache"}


def test_what_the_cache_of_nemotron_h_is_off_by_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward without cache raises time steps to a minimum, its decoding does not."""
    base, model = tiny_model("nemotron_h"), oracles.routed("nemotron_h")
    assert oracles.cached_equals_full(base, oracles.plain(oracles.ROWS)) > TOLERANCE
    assert oracles.cached_equals_full(model, oracles.ROWS) > TOLERANCE
    monkeypatch.setitem(OVERRIDES, "nemotron_h", {"time_step_min": 1e-9})
    model = oracles.routed("nemotron_h")
    assert oracles.cached_equals_full(model, oracles.ROWS) < TOLERANCE / 10
    assert oracles.beams_equal_full(model, oracles.ROWS) < TOLERANCE / 10


def test_marian_is_exported_with_a_table_that_holds_the_markers(tmp_path: Path) -> None:
    """It has two sizes of its vocabulary, and transformers raises one of them."""
    model = oracles.routed("marian")
    assert oracles.exported_is_routed("marian", model, tmp_path) <= TOLERANCE


def test_a_wrong_gate_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every token the expert of the next one, which a forward without cache alone can know."""

    def ahead(self: Any, step_ids: torch.Tensor) -> None:
        self.gate = torch.nn.functional.embedding(step_ids.roll(-1, dims=1), gate_table(self.config))

    monkeypatch.setattr("axolotl_mote.model.routed.Routing.set_gate", ahead)
    # Where the product checks itself, it refuses.
    wrong = {name for name, cell in examine("llama").items() if cell.kind in ("WRONG", "refused")}
    assert wrong >= {"dropout padded", "dropout packed", "own step", "cache", "beams"}


def test_outcomes_are_told_apart() -> None:
    def ours() -> float:
        from axolotl_mote.model.config import MoteConfig

        MoteConfig(expert_weight=2.0)
        return 0.0

    def theirs() -> float:
        return float(torch.zeros(2) @ torch.zeros(3))

    refused = judge(ours, lambda: 1.0)
    assert refused.kind == "refused"
    assert "expert_weight must be in [0, 1]" in refused.detail
    assert judge(theirs, lambda: 0.0).kind == "RAW"
    assert judge(theirs, theirs).kind == "base"
    assert judge(lambda: 2 * TOLERANCE, lambda: 0.0).kind == "WRONG"
    assert judge(lambda: 2 * TOLERANCE, lambda: 1.0).kind == "base"
    assert judge(lambda: TOLERANCE / 2, lambda: 1.0).kind == "right"


def test_the_page_says_why() -> None:
    refused = Outcome("refused", "mote.step_dropout must be 0 in zamba. Set it.")
    right = Outcome("right", difference=0.0)
    names = ["loss", "dropout padded", "packing", "cache", "quantized", "export"]
    results = {
        "zamba": dict.fromkeys(names, right) | {"dropout padded": refused},
        "blt": {"build": Outcome("not built", "no")},
    }
    text = page(results)
    assert "| zamba | right | refused [1] | right | right | right | right |" in text
    assert "| blt | not tested [2] |" in text
    assert "1. mote.step_dropout must be 0 in this model. Set it." in text
    assert json.loads(record(results))["families"] == {
        "zamba": ["right", "refused", *["right"] * 4],
        "blt": ["not tested"] * 6,
    }


def test_the_doctor_knows_what_the_page_says() -> None:
    known, text = json.loads(RECORD.read_text(encoding="utf-8")), PAGE.read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["family", *known["columns"]]
    said = {family: [re.sub(r" \[\d+\]$", "", cell).strip("*") for cell in cells] for family, *cells in rows[2:]}
    assert said == known["families"]
    assert all(f"{name} {number}" in text for name, number in known["versions"].items())
