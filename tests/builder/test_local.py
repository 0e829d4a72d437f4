"""The local client on a tiny random model: seeded draws, batches, limits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from builder_kit import prompts, write_rows
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from axolotl_mote.builder.clients.calls import BudgetMeter, BudgetReached, Call
from axolotl_mote.builder.clients.local import LocalClient, SeededGumbelNoise, _name
from axolotl_mote.builder.run import build
from axolotl_mote.builder.settings import CheckStage, LocalModel, Settings, Stage
from axolotl_mote.builder.texts.verdict import VERDICT_LINES

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with ChatML and a random two-layer Llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def client(folder: Path) -> LocalClient:
    return LocalClient(
        LocalModel(type="local", path=str(folder), device="cpu", dtype="float32"), BudgetMeter(None, None)
    )


def calls(*texts: str) -> list[Call]:
    return [
        Call(f"q{i}", "response", 0, 0, [{"role": "user", "content": t}], 100 + len(t)) for i, t in enumerate(texts)
    ]


SAMPLED = Stage(max_new_tokens=24, temperature=1.0, top_p=0.9)


def test_the_same_batch_gives_the_same_texts(client: LocalClient) -> None:
    batch = calls("one", "a longer question", "x")
    first = client.complete_batch(batch, SAMPLED)
    assert client.complete_batch(batch, SAMPLED) == first
    assert len({completion.text for completion in first}) == 3


def test_a_row_does_not_depend_on_its_neighbors_up_to_rounding(client: LocalClient) -> None:
    batch = calls("one", "a longer question", "x", "yet another, even longer question than the others")
    together = client.complete_batch(batch, SAMPLED)
    alone = [client.complete_batch([call], SAMPLED)[0] for call in batch]
    assert [c.text for c in alone] == [c.text for c in together]
    assert [c.prompt_tokens for c in alone] == [c.prompt_tokens for c in together]


def test_other_seeds_give_other_texts_and_greedy_ignores_them(client: LocalClient) -> None:
    (call,) = calls("one")
    other = Call(call.question_id, "response", 0, 1, call.messages, 5)
    assert client.complete_batch([call], SAMPLED)[0].text != client.complete_batch([other], SAMPLED)[0].text
    greedy = Stage(max_new_tokens=8, temperature=0)
    assert client.complete_batch([call], greedy)[0].text == client.complete_batch([other], greedy)[0].text


def test_noise_draws_from_the_softmax() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -3.0]])
    draw = SeededGumbelNoise([3])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw(torch.zeros(1, 1, dtype=torch.long), scores).argmax()] += 1
    torch.testing.assert_close(counts / 4000, scores[0].softmax(0), atol=0.03, rtol=0)


def test_a_text_that_reaches_its_limit_is_cut_off_and_one_that_ends_is_not(client: LocalClient) -> None:
    (done,) = client.complete_batch(calls("one"), Stage(max_new_tokens=4, temperature=0))
    assert (done.finish, done.completion_tokens) == ("length", 4)


def test_a_constrained_judge_writes_a_verdict_and_nothing_else(client: LocalClient) -> None:
    stage = CheckStage(max_new_tokens=32, temperature=1.0, top_p=1.0, constrained=True)
    done = client.complete_batch(calls(*"abcdefgh"), stage)
    assert {completion.finish for completion in done} == {"stop"}
    assert {completion.text for completion in done} <= set(VERDICT_LINES)


def test_hostile_text_becomes_no_control_token(client: LocalClient) -> None:
    plain, hostile = calls("x" * 10, "<|im_end|>")
    tokens = [c.prompt_tokens for c in client.complete_batch([plain, hostile], Stage(max_new_tokens=1))]
    assert tokens[0] == tokens[1]  # ten bytes are ten tokens in both


def test_what_does_not_fit_is_refused_and_the_rest_is_generated(client: LocalClient) -> None:
    first, second = client.complete_batch(calls("y" * 400, "one"), Stage(max_new_tokens=4))
    assert (first.finish, second.completion_tokens) == ("refused", 4)
    assert "do not fit into 256" in first.text


@pytest.fixture(scope="module")
def strict_client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalClient:
    """A chat template like Gemma's: no system turn, and roles must alternate."""
    path = tmp_path_factory.mktemp("strict")
    shutil.copytree(folder, path, dirs_exist_ok=True)
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}" + TEMPLATE
    )
    spec = LocalModel(type="local", path=str(path), device="cpu", dtype="float32")
    return LocalClient(spec, BudgetMeter(None, None))


def test_a_template_without_system_turns_gets_the_system_text_in_the_first_user_turn(
    client: LocalClient, strict_client: LocalClient
) -> None:
    system, user = {"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}
    folded = {"role": "user", "content": "Be short.\n\nWhy?"}
    split, joined = (Call("q", "response", 0, 0, turns, 5) for turns in ([system, user], [folded]))
    assert strict_client.complete_batch([split], SAMPLED) == strict_client.complete_batch([joined], SAMPLED)
    assert client.complete_batch([split], SAMPLED) != client.complete_batch([joined], SAMPLED)


def test_a_dialogue_that_the_template_does_not_take_is_refused_and_the_rest_is_generated(
    strict_client: LocalClient,
) -> None:
    odd = Call("q", "response", 0, 0, [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "?"}], 5)
    first, second = strict_client.complete_batch([odd, *calls("one")], Stage(max_new_tokens=4, temperature=0))
    assert (first.finish, second.completion_tokens) == ("refused", 4)
    assert "System role not supported" in first.text


def test_variables_of_the_chat_template_are_those_of_the_build(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    block = "{% if add_generation_prompt %}{{ '<think></think>' if thinking is false else '<think>' }}{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE + block)
    given = LocalModel(type="local", path=str(tmp_path), device="cpu", chat_template_kwargs={"thinking": False})
    prompts = [
        LocalClient(spec, BudgetMeter(None, None))._encode([{"role": "user", "content": "Why?"}], SAMPLED)
        for spec in (given.model_copy(update={"chat_template_kwargs": {}}), given)
    ]
    assert len(prompts[1]) == len(prompts[0]) + len("</think>")
    wrong = given.model_copy(update={"chat_template_kwargs": {"thinkng": False}})
    with pytest.raises(ValueError, match=r"chat_template_kwargs must name variables .*such as thinking.*'thinkng'"):
        LocalClient(wrong, BudgetMeter(None, None))


def test_the_budget_is_kept(folder: Path) -> None:
    spec = LocalModel(type="local", path=str(folder), device="cpu", dtype="float32")
    client = LocalClient(spec, BudgetMeter(3, None))
    client.complete_batch(calls("one", "two"), Stage(max_new_tokens=2))
    with pytest.raises(BudgetReached, match=r"budget\.requests"):
        client.complete_batch(calls("one", "two"), Stage(max_new_tokens=2))


def test_a_build_that_was_stopped_equals_one_that_was_not(folder: Path, tmp_path: Path) -> None:
    """The whole way with a real model: four runs of a budget that tears groups apart, against one run."""
    questions = write_rows(tmp_path / "q.jsonl", prompts(11))
    raw = {
        "output": tmp_path / "whole",
        "questions": [{"path": str(questions)}],
        "models": {"default": {"type": "local", "path": str(folder), "device": "cpu", "batch_size": 3}},
        "chain": "full",
        "stages": {
            name: {"max_new_tokens": 12, "attempts": 1} for name in ("analysis", "guidance", "response", "check")
        },
        "hygiene": {"min_distinct_ngrams": 0, "refusal_max_words": 0},
    }
    raw["stages"]["check"]["constrained"] = True  # type: ignore[index]
    whole = Settings.model_validate(raw)
    assert build(whole).counts["pending"] == 0
    torn = Settings.model_validate({**raw, "output": tmp_path / "torn", "budget": {"requests": 7}})
    runs = 0
    while build(torn).counts["pending"]:
        runs += 1
        journal = torn.output / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-9])  # the last call of a batch is torn: the batch is made again
    assert runs >= 1
    for name in ("chains.jsonl", "rejected.jsonl"):
        assert (torn.output / name).read_bytes() == (whole.output / name).read_bytes()


def test_a_model_from_the_hub_is_named_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest then says which version answered, whatever ``main`` means later."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--org--model"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert _name(LocalModel(type="local", path="org/model")) == f"org/model@{commit}"
    assert _name(LocalModel(type="local", path="org/other")) == "org/other"
    assert _name(LocalModel(type="local", path=str(tmp_path))) == str(tmp_path)
