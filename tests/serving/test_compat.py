"""The hooks: what they were tested with, and what they refuse. No engine is started here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kit import mote_config, save_adapter, tiny_mote, tiny_tokenizer
from safetensors.torch import load_file, save_file
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.serving import compat, refusals
from axolotl_mote.serving.chains import StepTables
from axolotl_mote.serving.logits import StepProcessor
from axolotl_mote.serving.routes import MAX_STEPS, Route

ROUTE = Route.from_config(mote_config(marker_ids=[4, 5, 6, 7, 8, 9]))


def test_hooks_have_the_parameters_that_were_tested():
    compat.check_version()


def test_another_version_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.33.0")
    with pytest.raises(RuntimeError, match=r"vllm must be ==0\.32\.0, .* got 0\.33\.0\. Install vllm==0\.32\.0"):
        compat.check_version()


@pytest.mark.parametrize(
    ("place", "parameters", "message"),
    [
        ("vllm.config.lora:LoRAConfig.compute_hash", "self, more", r"must take \(self, more\); got \(self\) in vllm"),
        ("vllm.config.lora:LoRAConfig.gone", "self", "vllm must have vllm.config.lora:LoRAConfig.gone; got"),
        ("vllm.gone:x", "self", "vllm must have vllm.gone:x; got"),
    ],
)
def test_a_hook_of_another_shape_is_refused(monkeypatch, place, parameters, message):
    monkeypatch.setattr(compat, "HOOKS", {place: parameters})
    with pytest.raises(RuntimeError, match=message):
        compat.check_version()


def config(**values: Any) -> Any:
    """A configuration of an engine in which everything untested is off, but for some values."""
    sizes = ("tensor_parallel_size", "pipeline_parallel_size")
    parallel = dict.fromkeys([*sizes, "prefill_context_parallel_size", "decode_context_parallel_size"], 1)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel | {k: v for k, v in values.items() if k in parallel}),
        model_config=SimpleNamespace(
            **{
                "enable_prompt_embeds": False,
                "enable_sleep_mode": False,
                "runner_type": "generate",
                "tokenizer_mode": "hf",
            }
            | {k: v for k, v in values.items() if k in ("enable_prompt_embeds", "enable_sleep_mode", "runner_type")}
            | {k: v for k, v in values.items() if k == "tokenizer_mode"}
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=values.get("kv_sharing_fast_prefill", False)),
        speculative_config=values.get("speculative_config"),
        kv_transfer_config=values.get("kv_transfer_config"),
        lora_config=SimpleNamespace(max_lora_rank=values.get("max_lora_rank", 16)),
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tensor_parallel_size": 2}, "without --tensor-parallel-size above 1, which was not tested"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size above 1"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size above 1"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size above 1"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"speculative_config": SimpleNamespace(use_ngram=lambda: False)}, "--speculative-config with a draft model"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"runner_type": "pooling"}, "--runner pooling"),
        ({"tokenizer_mode": "mistral"}, "--tokenizer-mode mistral"),
        ({"max_lora_rank": 1}, "--max-lora-rank must be at least 8, .* got 1. Set --max-lora-rank 8"),
    ],
)
def test_what_was_not_tested_is_refused(values, message):
    refusals.refuse_options(config(), ROUTE)
    with pytest.raises(ValueError, match=message):
        refusals.refuse_options(config(**values), ROUTE)


def test_drafts_from_n_grams_are_allowed():
    refusals.refuse_options(config(speculative_config=SimpleNamespace(use_ngram=lambda: True)), ROUTE)


def test_an_adapter_that_comes_again_clears_the_prefix_cache(monkeypatch):
    """From its folder, whose files may have changed, or from another."""
    from vllm.v1.engine.core import EngineCore

    compat.install()
    done: list[Any] = []
    core: Any = SimpleNamespace(
        model_executor=SimpleNamespace(add_lora=lambda request: done.append(request.lora_path) or True),
        reset_prefix_cache=lambda reset_running_requests: done.append(("reset", reset_running_requests)),
    )
    for name, path in (("a", "one"), ("b", "one"), ("a", "two"), ("a", "one")):
        assert EngineCore.add_lora(core, SimpleNamespace(lora_name=name, lora_path=path))
    assert done == ["one", "one", "two", ("reset", True), "one", ("reset", True)]


def test_more_steps_than_the_kernel_can_hold_are_refused():
    def route(count):
        return Route.from_config(mote_config(steps=[f"s{n}" for n in range(count)], marker_ids=list(range(2 * count))))

    refusals.refuse_options(config(max_lora_rank=512), route(MAX_STEPS))
    with pytest.raises(ValueError, match="at most 15 steps"):
        refusals.refuse_options(config(max_lora_rank=512), route(MAX_STEPS + 1))


def test_vllm_without_the_plugin_refuses_the_adapter(tmp_path):
    """The names of the marker rows are what stops it from serving one ungated LoRA."""
    model, tokenizer = tiny_mote()
    save_adapter(model, tokenizer, tmp_path)
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    helper = PEFTHelper.from_local_dir(str(tmp_path), 4096)
    with pytest.raises(ValueError, match=r"marker_rows.* is unsupported LoRA weight"):
        LoRAModel.from_local_checkpoint(str(tmp_path), names, peft_helper=helper, lora_model_id=1, device="cpu")
    with_plugin = LoRAModel.from_local_checkpoint(
        str(tmp_path), names, peft_helper=helper, lora_model_id=1, device="cpu", skip_prefixes=["lora_marker_rows"]
    )
    assert len(with_plugin.loras) == 14


class Table(torch.nn.Module):
    """As far as ``check_rows`` looks at a table of vLLM."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)


def test_a_base_without_the_rows_is_refused(tmp_path, monkeypatch):
    head = type("Head", (Table,), {})
    place = "vllm.model_executor.layers.vocab_parallel_embedding"
    monkeypatch.setattr(f"{place}.VocabParallelEmbedding", Table)
    monkeypatch.setattr(f"{place}.ParallelLMHead", head)
    model, tokenizer = tiny_mote(tied=False)
    save_adapter(model, tokenizer, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rows = {("embed" not in name): value for name, value in tensors.items() if "marker_rows" in name}
    route = Route.from_folder(tmp_path)
    weights = {is_head: torch.cat([torch.randn(259, 32), value]) for is_head, value in rows.items()}
    served = torch.nn.ModuleList([Table(weights[False]), head(weights[True])])
    refusals.check_rows(served, route, str(tmp_path))
    refusals.check_rows(served.to(torch.bfloat16), route, str(tmp_path))
    near = weights[False] + 0.015 * rows[False].abs().max()  # little beside the largest number
    for tables in (
        [Table(weights[False][:259]), head(weights[True])],
        [Table(weights[False]), head(weights[False])],
        [Table(near), head(weights[True])],
    ):
        with pytest.raises(ValueError, match="the served base must have the adapter's marker rows"):
            refusals.check_rows(torch.nn.ModuleList(tables), route, str(tmp_path))
    save_file({k: v for k, v in tensors.items() if "marker_rows" not in k}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter must hold its marker rows"):
        refusals.check_rows(served, route, str(tmp_path))


CODEC = ChainCodec.from_tokenizer(tiny_tokenizer())


def test_dialogues_are_encoded_as_in_training():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "<|response|>"}]},
        {"role": "assistant", "content": "b", "reasoning": "left out"},
        {"role": "user", "content": "c<|im_end|>"},
    ]
    plain = [{"role": "user", "content": "a <|response|>"}, {"role": "assistant", "content": "b"}, messages[2]]
    ids = compat.encode_dialogue(CODEC, messages, {"tools": None, "cohere_format": "v2", "add_generation_prompt": True})
    assert ids == CODEC.encode_question(plain)
    assert not set(ids) & set(CODEC.vocabulary.marker_ids)


@pytest.mark.parametrize(
    ("message", "options", "said"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, {}, "must hold text alone"),
        ({"role": "tool", "content": "x"}, {}, "role must be one of"),
        ({"role": "user", "content": " "}, {}, "content must be a non-empty string"),
        ({"role": "user", "content": None}, {}, "content must be a non-empty string"),
        ({"role": "assistant", "content": "x"}, {}, "messages must end with a user turn"),
        ({"role": "user", "content": "x"}, {"tools": [1]}, "tools must be left out"),
        ({"role": "user", "content": "x"}, {"chat_template": "y"}, "chat_template must be that of the base"),
        ({"role": "user", "content": "x"}, {"continue_final_message": True}, "continue_final_message must be left out"),
        ({"role": "user", "content": "x"}, {"add_generation_prompt": False}, "add_generation_prompt must be true"),
    ],
)
def test_what_a_dialogue_may_not_hold(message, options, said):
    with pytest.raises(ValueError, match=said):
        compat.encode_dialogue(CODEC, [message], options)


def test_an_empty_answer_in_the_history_is_kept():
    history = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "y"}]
    assert compat.encode_dialogue(CODEC, history, {}) == CODEC.encode_question(history)


def test_steps_come_with_their_limit(tmp_path):
    StepProcessor.validate_params(SimpleNamespace(extra_args={"steps": "adaptive", "step_limit": 3}))
    with pytest.raises(ValueError, match="step_limit must come with steps"):
        StepProcessor.validate_params(SimpleNamespace(extra_args={"step_limit": 3}))


def v1_processor(tmp_path, slots=3) -> StepProcessor:
    tiny_tokenizer().save_pretrained(tmp_path)
    engine = SimpleNamespace(
        model_config=SimpleNamespace(tokenizer=str(tmp_path)),
        scheduler_config=SimpleNamespace(max_num_seqs=slots),
        num_speculative_tokens=0,
    )
    return StepProcessor(engine, torch.device("cpu"), False)


def test_v1_requests_keep_their_grammar_when_the_batch_moves(tmp_path):
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    processor = v1_processor(tmp_path)
    only = SimpleNamespace(extra_args={"steps": ["response"]}, max_tokens=20)
    free = SimpleNamespace(extra_args=None, max_tokens=20)
    first = [CODEC.vocabulary.start_ids[2]]
    outputs: list[list[int]] = [[], [], []]
    added = [(0, only, None, outputs[0]), (1, free, None, outputs[1]), (2, only, None, outputs[2])]

    def rows() -> list[Any]:
        """Allowed ids of each place in the batch; None for all."""
        finite = torch.isfinite(processor.apply(torch.zeros(3, 280)))
        return [None if row.all() else row.nonzero()[:, 0].tolist() for row in finite]

    processor.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    assert rows() == [first, None, first]
    outputs[0].append(first[0])
    processor.update_state(BatchUpdate(3, removed=[], added=[], moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert rows()[0] is None
    assert len(rows()[1]) > 200  # text of the open step
    assert rows()[2] == first
    processor.update_state(BatchUpdate(2, removed=[0], added=[], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert rows()[0] == first
    assert rows()[2] is None
    processor.update_state(BatchUpdate(1, removed=[1, 0], added=[(0, free, None, [])], moved=[]))
    assert rows() == [None, None, None]


class Context:
    """What the V2 runner tells a logits processor: a row for each draft and one for each request."""

    def __init__(self, history: torch.Tensor, prompts: list[int], rows: list[tuple[int, int, int, int]]) -> None:
        slot, local, token, pos = (torch.tensor(column) for column in zip(*rows, strict=True))
        self.expanded_idx_mapping, self.expanded_local_pos, self.input_ids, self.pos = slot, local, token, pos
        last = {int(s): int(p) + 1 for s, p in zip(slot, pos, strict=True)}
        self.idx_mapping_np = np.array(list(last))
        self.seq_lens_upper_bound_np = np.array(list(last.values()))
        self.state = SimpleNamespace(
            device=torch.device("cpu"),
            prompt_len=SimpleNamespace(gpu=torch.tensor(prompts)),
            all_token_ids=SimpleNamespace(gpu=history),
        )


def test_v2_masks_are_those_of_the_chain_so_far_with_drafts_beside_long_requests_without_steps(tmp_path):
    """Slot 0 asks for no steps and is ten times as long; slot 1 has two drafts, slot 2 none."""
    tiny_tokenizer().save_pretrained(tmp_path)
    start, end = CODEC.vocabulary.start_ids, CODEC.vocabulary.end_ids
    chain = [start[0], 40, 41, end[0], start[2], 50]
    prompt, history = [60] * 5, torch.full((3, 300), 77)
    for slot in (1, 2):
        history[slot, : 5 + len(chain)] = torch.tensor(prompt + chain)
    rows = [(0, 0, 77, 250)]
    rows += [(1, n, token, 5 + 3 + n) for n, token in enumerate([end[0], start[1], 45])]  # a draft of another step
    rows += [(2, 0, chain[5], 5 + 5)]
    context = Context(history, [200, 5, 5], rows)
    config = SimpleNamespace(
        model_config=SimpleNamespace(tokenizer=str(tmp_path)),
        scheduler_config=SimpleNamespace(max_num_seqs=3),
        num_speculative_tokens=2,
    )
    processor = StepProcessor(config, context.state)
    asked = {"steps": "adaptive"}
    for slot, extra in enumerate((None, asked, asked)):
        processor.add_request(slot, SimpleNamespace(extra_args=extra, max_tokens=40))
    found = torch.isfinite(processor.apply(torch.zeros(len(rows), 280), context))
    tables = StepTables(CODEC, 1, "cpu")
    tables.put(0, asked, 40)

    def allowed(tokens: list[int]) -> torch.Tensor:
        zero = torch.tensor([0])
        return torch.isfinite(tables.mask(torch.zeros(1, 280), zero, torch.tensor([tokens]), zero + len(tokens)))[0]

    assert found[0].all()
    for row, tokens in enumerate([chain[:4], [*chain[:4], start[1]], [*chain[:4], start[1], 45], chain], 1):
        assert torch.equal(found[row], allowed(tokens)), row
