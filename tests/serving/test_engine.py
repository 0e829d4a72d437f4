"""Both of vLLM's runners against transformers: log-probabilities, greedy text, and the engine's own route."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import naive_step_ids
from peft import PeftModel
from serving_kit import MODES, QUESTIONS, run_engine, write_folders
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_mote.generation.api import generate_chain
from axolotl_mote.generation.folder import read_mote_config
from axolotl_mote.generation.loading import load_mote

TOLERANCE = 1e-4
PARTS = ("prompt", "single", "cached", "second_turn", "mixed", "replaced")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("serving"))


ENGINES = {
    "v1": {"asynchronous": True},
    "v2": {"asynchronous": True},
    "v1-drafts": {},
    "v2-drafts": {"asynchronous": True},
}
"""V1 has no asynchronous scheduling beside drafts from n-grams, and no logits processors."""


@pytest.fixture(scope="session")
def first_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What V1 said: every other draft of the runs with drafts comes from it."""
    out = tmp_path_factory.mktemp("v1") / "out.json"
    run_engine(folder, out, "v1", **ENGINES["v1"])
    return out


@pytest.fixture(scope="session", params=list(ENGINES))
def result(request: pytest.FixtureRequest, folder: Path, first_run: Path) -> dict[str, Any]:
    name, options = request.param, ENGINES[request.param]
    if name == "v1":
        found = json.loads(first_run.read_text())
    else:
        options = options | ({"drafts": str(first_run)} if "drafts" in name else {})
        found = run_engine(folder, first_run.with_name(f"{name}.json"), name[:2], **options)
    assert (found["v2"], found["asynchronous"]) == (name.startswith("v2"), "asynchronous" in options)
    return found | {"drafts": "drafts" in name}


@cache
def judge(folder: Path, name: str) -> Any:
    """The model that transformers makes of an adapter."""
    if name in ("adapter", "two", "changed"):
        return load_mote(folder / name, folder / "base", dtype=torch.float32)[0]
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    return base if name == "base" else PeftModel.from_pretrained(base, folder / name).eval()


@torch.no_grad()
def logits(folder: Path, row: dict[str, Any]) -> torch.Tensor:
    ids = torch.tensor([row["prompt"] + row["ids"]])
    return judge(folder, row["adapter"])(input_ids=ids).logits[0].float()


@pytest.mark.parametrize("part", PARTS)
def test_log_probabilities_and_greedy_text_are_those_of_transformers(result, folder, part):
    for row in result[part]["rows"]:
        raw = logits(folder, row)
        table, length = raw.log_softmax(-1), len(row["prompt"])
        ids = row["prompt"] + row["ids"]
        for place, got in [*enumerate(row["prompt_logprobs"], 1), *enumerate(row["logprobs"], length)]:
            assert abs(float(table[place - 1, ids[place]]) - got) < TOLERANCE, (part, row["adapter"], place)
        assert raw[length - 1 : -1].argmax(-1).tolist() == row["ids"]


def test_steps_change_while_decoding(result, folder):
    if "chains" not in result:
        pytest.skip("vLLM's V1 runner has no logits processors beside drafts")
    config = read_mote_config(folder / "adapter")
    changes = 0
    for row in result["chains"]["rows"]:
        steps = naive_step_ids(row["prompt"] + row["ids"], config)[len(row["prompt"]) :]
        changes += sum(a != b for a, b in pairwise(steps))
    assert changes >= 10


def test_a_route_that_is_late_by_one_token_would_show(folder, result):
    """The tolerance is not so wide that a wrong route passes."""
    config, model = read_mote_config(folder / "adapter"), judge(folder, "adapter")
    worst = 0.0
    for row in result["prompt"]["rows"]:
        steps = naive_step_ids(row["prompt"], config)
        late = torch.tensor([[steps[0], *steps[:-1]]])
        with torch.no_grad():
            table = model(input_ids=torch.tensor([row["prompt"]]), step_ids=late).logits[0].log_softmax(-1)
        for place, got in enumerate(row["prompt_logprobs"], 1):
            worst = max(worst, abs(float(table[place - 1, row["prompt"][place]]) - got))
    assert worst > 0.05


@pytest.mark.parametrize("part", ["prompt", "cached", "second_turn", "mixed"])
def test_no_position_is_misrouted_in_the_engine(result, folder, part):
    """The trace holds (slot, step) of every token that was computed.

    Preempted requests are computed again, and wrong drafts are computed too.
    """
    got = Counter(pair for slots, steps in result[part]["trace"] for pair in zip(slots, steps, strict=True))
    wanted: Counter[Any] = Counter()
    for row in result[part]["rows"]:
        ids = (row["prompt"] + row["ids"])[row["cached"] : -1]  # the last token is never fed
        name = row["adapter"]
        if name in ("adapter", "two"):
            steps = naive_step_ids(row["prompt"] + row["ids"], read_mote_config(folder / name))
            wanted.update((name, step) for step in steps[row["cached"] : -1])
        else:
            wanted[name, 0] += len(ids)
    by_step = Counter({step: sum(n for (_, s), n in got.items() if s == step) for step in range(4)})
    expected = Counter({step: sum(n for (_, s), n in wanted.items() if s == step) for step in range(4)})
    if result["drafts"] or (part == "mixed" and result["metrics"]["vllm:num_preemptions"]):
        assert all(by_step[step] >= expected[step] for step in range(4))
    else:
        assert by_step == expected


def test_prefixes_are_hit_and_requests_preempted(result):
    assert sum(row["cached"] for row in result["cached"]["rows"]) >= 200
    assert sum(row["cached"] for row in result["second_turn"]["rows"]) >= 200
    assert result["drafts"] or result["metrics"]["vllm:num_preemptions"] >= 1


def test_drafts_are_taken_and_refused(result):
    if not result["drafts"]:
        pytest.skip("no drafts")
    drafts, taken = (result["metrics"][f"vllm:spec_decode_num_{n}_tokens"] for n in ("draft", "accepted"))
    assert taken >= 200
    assert drafts - taken >= 200


def test_nothing_of_a_replaced_adapter_is_left_in_the_prefix_cache(result):
    assert [row["cached"] for row in result["replaced"]["rows"]] == [0, 0]


def test_batches_equal_single_requests(result):
    for alone in result["single"]["rows"]:
        for part in ("cached", "mixed"):
            same = [r for r in result[part]["rows"] if r["adapter"] == "adapter" and r["prompt"] == alone["prompt"]]
            assert all(row["ids"][: len(alone["ids"])] == alone["ids"] for row in same)


def test_chains_are_those_of_generate_chain_in_every_mode_of_one_batch(result, folder):
    """Greedy, token for token; a request without steps beside them is left alone."""
    if "chains" not in result:
        pytest.skip("vLLM's V1 runner has no logits processors beside drafts")
    model, tokenizer = judge(folder, "adapter"), AutoTokenizer.from_pretrained(folder / "adapter")
    rows = iter(result["chains"]["rows"])
    for text in QUESTIONS:
        messages = [{"role": "user", "content": text}]
        for mode in MODES:
            row = next(rows)
            chain = generate_chain(model, tokenizer, messages, mode, max_new_tokens=40, step_limits=9)
            assert row["ids"][: len(chain.token_ids)] == list(chain.token_ids), (text, mode)
            assert len(row["ids"]) - len(chain.token_ids) in (0, 1)  # the stop token
        row = next(rows)  # one that asked for nothing
        assert logits(folder, row)[len(row["prompt"]) - 1 : -1].argmax(-1).tolist() == row["ids"]
