"""The routing of a forward belongs to that forward: threads that share a model, and backward passes that come later."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from kit import MARKER_IDS, VOCABULARY, chain, mote, tiny_mote
from torch import Tensor

from axolotl_mote.generation.api import generate_chain
from axolotl_mote.model.adapter import adapter_disabled, mote_model

THREADS = 8


def in_threads(jobs: list[Callable[[], Any]], threads: int = THREADS) -> list[Any]:
    """Results of jobs that start together."""
    barrier = threading.Barrier(threads)

    def start() -> None:
        barrier.wait(timeout=60)

    with ThreadPoolExecutor(threads, initializer=start) as pool:
        return [future.result(timeout=300) for future in [pool.submit(job) for job in jobs]]


def test_eight_threads_answer_as_one_does() -> None:
    """Questions of different lengths, each asked 50 times: plain tokens and chains, some of them judged by the base."""
    model, tokenizer = tiny_mote()
    questions = [[{"role": "user", "content": chr(96 + length) * length}] for length in (1, 2, 3, 5, 8, 13, 21, 26)]
    modes: list[dict[str, Any]] = [{"steps": ["response"]}, {"steps": "adaptive"}, {"steps": "verify"}]
    limits = {"step_limits": 3, "max_new_tokens": 24}

    def ask(number: int) -> tuple[int, ...]:
        mode = modes[0] if number % 10 else modes[1 + number // 10 % 2]
        chains = generate_chain(model, tokenizer, [questions[number % THREADS]], **limits, **mode)
        return (*chains[0].token_ids, chains[0].verdict == "safe")

    asked = list(range(THREADS * 50))
    expected = {key: ask(number) for number in asked if (key := number % 40) == number}  # 40 different questions
    assert len(set(expected.values())) >= 8
    found = in_threads([lambda number=number: ask(number) for number in asked])  # type: ignore[misc]
    assert found == [expected[number % 40] for number in asked]


def test_a_base_that_judges_disables_nothing_elsewhere() -> None:
    model = mote()
    ids = torch.tensor([chain()])
    expected = model(input_ids=ids).logits
    stop = threading.Event()
    found: list[bool] = []

    def judge() -> None:
        for _ in range(100):
            with adapter_disabled(model), torch.no_grad():
                assert model(input_ids=ids % VOCABULARY).logits.shape[-1] == VOCABULARY
        stop.set()

    thread = threading.Thread(target=judge)
    thread.start()
    while not stop.is_set() and thread.is_alive():
        with torch.no_grad():
            found.append(torch.equal(model(input_ids=ids).logits, expected))
    thread.join()
    assert stop.is_set()
    assert all(found)


def test_beam_searches_in_threads_leave_the_configuration_as_it_was() -> None:
    model = mote()
    prompts = [torch.tensor([chain(length, 2, 0, 0)[:-1]]) for length in (3, 4, 5, 6)]
    options = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(input_ids=prompt, **options).tolist() for prompt in prompts]
    jobs = [lambda p=prompt: model.generate(input_ids=p, **options).tolist() for prompt in prompts * 5]  # type: ignore[misc]
    assert in_threads(jobs, 4) == expected * 5
    assert model.config.vocab_size == VOCABULARY


@pytest.mark.parametrize(
    ("family", "copied"),  # with transformers 5.16 most bases, Llama among them, cannot be pickled themselves
    [("llama", copy.deepcopy), ("phi3", lambda model: pickle.loads(pickle.dumps(model)))],
)
def test_a_copy_made_during_another_threads_generation_is_as_any_other(
    family: str, copied: Callable[[Any], Any]
) -> None:
    model = mote(family)
    prompt = torch.tensor([chain()[:5]])
    options = {"max_new_tokens": 6, "num_beams": 2, "pad_token_id": 0}
    expected = model.generate(input_ids=prompt, **options).tolist()
    inside, released = threading.Event(), threading.Event()

    def pause(ids: Tensor, *_: Any) -> Tensor:  # between two forwards
        inside.set()
        assert released.wait(60)
        return torch.zeros(len(ids), dtype=torch.bool)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: model.generate(input_ids=prompt, stopping_criteria=[pause], **options).tolist())
        try:
            assert inside.wait(60)
            assert model.config.vocab_size > VOCABULARY
            twin = copied(model)
        finally:
            released.set()
        assert answer.result() == expected
    for module in (twin, twin.get_base_model(), twin.get_base_model().model):
        assert module.config.vocab_size == VOCABULARY
    assert twin.generate(input_ids=prompt, **options).tolist() == expected
    assert model.config.vocab_size == VOCABULARY


def test_an_interrupted_forward_leaves_the_model_free() -> None:
    model = mote()
    ids = torch.tensor([chain()])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=ids)
    handle.remove()
    assert in_threads([lambda: model(input_ids=ids).logits.shape], 1) == [(1, ids.shape[1], VOCABULARY + 6)]


# --- backward passes that come later --------------------------------------------------------------------------------

FIRST = torch.tensor([chain(seed=1)])
SECOND = torch.tensor([chain(11, 0, 3, 6, seed=2)])  # as long, with other steps


def gradients(checkpointing: bool, attention: str, run: Callable[[Any, Callable[[Tensor], Tensor]], None]) -> Any:
    model = mote(attention=attention)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mote_model(model).routing.step_dropout = (0.5, 0.5)
    model.train()

    def loss(ids: Tensor) -> Tensor:
        targets = torch.where(ids < MARKER_IDS[0], ids, -100)
        return model(input_ids=ids, targets=targets).loss.sum()

    run(model, loss)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def two_losses(model: Any, loss: Callable[[Tensor], Tensor]) -> None:
    (loss(FIRST) + loss(SECOND)).backward()


def one_after_the_other(model: Any, loss: Callable[[Tensor], Tensor]) -> None:
    first, second = loss(FIRST), loss(SECOND)
    first.backward()
    second.backward()


def evaluation_between(model: Any, loss: Callable[[Tensor], Tensor]) -> None:
    first = loss(FIRST)
    model.eval()
    with torch.no_grad():
        model(input_ids=SECOND)
        model.generate(input_ids=SECOND[:, :4], max_new_tokens=3, pad_token_id=0)
    model.train()
    first.backward()


def loss_from_logits(model: Any, loss: Callable[[Tensor], Tensor]) -> None:
    """Of two forwards, with the base as a reference between them and their backward pass."""
    first, second = (model(input_ids=ids, labels=ids).logits for ids in (FIRST, SECOND))
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=FIRST % VOCABULARY)
    (first[..., :VOCABULARY].square().sum() + second[..., :VOCABULARY].square().sum()).backward()


def backward_elsewhere(model: Any, loss: Callable[[Tensor], Tensor]) -> None:
    """As on CUDA, where autograd has a thread of its own."""
    first, second = loss(FIRST), loss(SECOND)
    in_threads([lambda: (first.backward(), second.backward())], 1)


@pytest.mark.parametrize("attention", ["sdpa", "mote_varlen"])
@pytest.mark.parametrize(
    "run", [two_losses, one_after_the_other, evaluation_between, loss_from_logits, backward_elsewhere]
)
def test_recomputed_layers_are_routed_as_their_forward_was(run: Any, attention: str) -> None:
    expected, found = (gradients(checkpointing, attention, run) for checkpointing in (False, True))
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5, rtol=1e-4), name


def test_generating_leaves_no_state_behind() -> None:
    model = mote()
    routing = mote_model(model).routing
    model.generate(input_ids=torch.tensor([chain()]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert (routing.gate, routing.segments, routing.step_ids) == (None, None, None)
