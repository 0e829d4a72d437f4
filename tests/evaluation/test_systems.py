"""Systems: what they answer, and how one loaded copy serves many who ask."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import STEPS, tiny_model, tiny_tokenizer
from systems_kit import HOSTILE, questions, write_systems
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.evaluation import systems
from axolotl_mote.evaluation.systems import Answer, Settings, SharedSystem, System, SystemSpec, find_system
from axolotl_mote.generation import generate_chain, load_mote

HI = [{"role": "user", "content": "hi"}]
SHORT = Settings(max_new_tokens=24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_systems(tmp_path_factory.mktemp("systems"))


@pytest.fixture(scope="module")
def loaded(folders: Path) -> dict[str, System]:
    return {name: System(find_system(str(folders / name))) for name in ("base", "mote", "lora")}


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    systems.release_all()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"dtype": "float33"}, r"dtype must be auto, float32, bfloat16 or float16; got 'float33'"),
        ({"dtype": "int8"}, r"dtype must be .*; got 'int8'"),
        ({"dtype": "nn"}, r"dtype must be .*; got 'nn'"),
        ({"device": "gpu"}, r"device must be there, such as cpu or cuda:0; got 'gpu': "),
        ({"device": "cuda:99"}, r"device must be there, .*; got 'cuda:99': "),
    ],
)
def test_a_dtype_or_device_that_is_not_there(folders, place, message):
    with pytest.raises(ValueError, match=message):
        find_system(str(folders / "base"), **place)


# --- what a system answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mote", "lora"])
@pytest.mark.parametrize("steps", ["adaptive", "verify", "response", "analysis+response", "analysis+guidance+response"])
def test_chains_are_those_of_generate_chain(folders, loaded, kind, steps):
    system, asked = loaded[kind], questions(8)
    chosen = systems.parse_steps(steps, system.vocabulary, False)
    answers = system.answer(asked, Settings(steps=chosen, max_new_tokens=24))
    model, tokenizer = load_mote(folders / kind)
    chains = generate_chain(model, tokenizer, asked, chosen if isinstance(chosen, str) else list(chosen), 24)
    for answer, chain in zip(answers, chains, strict=True):
        assert (answer.texts, answer.token_counts) == (chain.texts, chain.token_counts)
        assert (answer.answer, answer.finished, answer.check) == (chain.answer, chain.finished, chain.check)
        assert (answer.output_tokens, answer.truncated) == (chain.spent, chain.truncated)
        assert list(answer.reasoning) == [name for name in chain.steps if name != "response"]


def test_a_base_model_answers_as_its_own_generate_does(folders, loaded):
    asked = questions(8)
    answers = loaded["base"].answer(asked, Settings(max_new_tokens=40))
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    model = AutoModelForCausalLM.from_pretrained(folders / "base").eval()
    codec = ChainCodec(tokenizer)
    for messages, answer in zip(asked, answers, strict=True):
        prompt = codec.encode_question(messages)
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=codec.stop_id, pad_token_id=1
        )
        new = output[0, len(prompt) :].tolist()
        ended = new[-1] == codec.stop_id
        assert answer.texts == {"response": tokenizer.decode(new[:-1] if ended else new)}
        assert answer.token_counts == {"response": len(new) - ended}
        assert (answer.input_tokens, answer.output_tokens) == (len(prompt), len(new))
        assert answer.truncated == (() if ended else ("response",))
        assert not answer.reasoning


def test_a_base_model_that_thinks_first(loaded, monkeypatch):
    """The answer alone is the answer, and every token is counted."""
    system = loaded["base"]
    encode = lambda text: system.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    said: list[int] = []
    monkeypatch.setattr(
        system.model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([said])], dim=1)
    )

    def answer(text: str, ended: bool = True) -> Answer:
        said[:] = [*encode(text), *([system.codec.stop_id] if ended else [])]
        (found,) = system.answer([HI], SHORT)
        assert sum(found.token_counts.values()) == len(encode(text))
        assert found.output_tokens == len(said)
        return found

    whole = answer("<think>\nA game: 你好.\n</think>\n\nPress start.")
    assert whole.texts == {"reasoning": "A game: 你好.", "response": "Press start."}
    assert (whole.answer, whole.reasoning) == ("Press start.", {"reasoning": "A game: 你好."})
    assert whole.token_counts["reasoning"] == len(encode("<think>\nA game: 你好.\n</think>"))
    assert (whole.finished, whole.truncated) == (True, ())
    half = answer("<think>A game</think>Press", ended=False)
    assert (half.answer, half.finished, half.truncated) == ("Press", False, ("response",))
    for ended in (True, False):
        lost = answer("<think>A game", ended)
        assert (lost.answer, lost.texts["reasoning"]) == ("", "A game")
        assert (lost.finished, lost.truncated) == (False, ("reasoning",))
    plain = answer("A game</think>Press <think>start</think>.")
    assert plain.texts == {"response": "A game</think>Press <think>start</think>."}
    monkeypatch.setitem(vars(system), "_opened", "<think>")
    assert answer("A game</think>Press <think>start</think>.").answer == "Press <think>start</think>."
    assert answer("Press start.").answer == ""


@pytest.mark.parametrize(("end", "opened"), [("<think>\n", "<think>"), ("<think>\n\n</think>\n\n", None), ("", None)])
def test_what_the_template_leaves_open(folders, tmp_path, end, opened):
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    tokenizer.chat_template += f"{{% if add_generation_prompt %}}{end}{{% endif %}}"
    tokenizer.save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    assert System(find_system(str(tmp_path)))._opened == opened


def test_a_base_model_ends_its_answers(loaded):
    answers = loaded["base"].answer(questions(32), Settings(max_new_tokens=150, temperature=1.0))
    ended = [answer for answer in answers if not answer.truncated]
    assert 0 < len(ended) < 32
    for answer in answers:
        assert "<|im_end|>" not in answer.answer
        assert answer.output_tokens == answer.token_counts["response"] + (answer in ended)
        assert answer.finished == (answer in ended and bool(answer.answer.strip()))


def test_a_question_that_cannot_be_answered_fails_alone(loaded):
    hostile: list[Any] = [
        [{"role": "user", "content": "x" * 5000}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user"}],
        [],
    ]
    for kind, system in loaded.items():
        results = system.answer([HI, *hostile, HI], SHORT)
        assert [isinstance(result, ValueError) for result in results] == [False, *[True] * len(hostile), False], kind
        assert results[0] == results[-1]
        assert "must fit the model's 4096 positions" in str(results[1])


def test_a_template_that_refuses_fails_the_question_alone(folders, loaded, monkeypatch):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    for system in loaded.values():
        monkeypatch.setattr(system.tokenizer, "chat_template", template + system.tokenizer.chat_template)
        refused, answer = system.answer([[{"role": "system", "content": "x"}, *HI], HI], SHORT)
        assert "no system turn" in str(refused)
        assert isinstance(answer, Answer)


def test_without_a_limit_an_answer_has_what_the_context_leaves(loaded, monkeypatch):
    system = loaded["mote"]
    monkeypatch.setattr(systems, "DEFAULT_MAX_NEW_TOKENS", 100)
    monkeypatch.setattr(system.model.config, "max_position_embeddings", 256)
    spare = len(system.codec.encode_question(HI)) - 2

    def tokens(length: int) -> int | str:
        try:
            return system._encode([{"role": "user", "content": "x" * length}], Settings())[1]
        except ValueError as error:
            return str(error)

    assert tokens(2) == 100
    monkeypatch.setattr(systems, "DEFAULT_MAX_NEW_TOKENS", 400)
    assert tokens(100) == 256 - spare - 100
    assert tokens(256 - spare - systems.LEAST_NEW_TOKENS) == systems.LEAST_NEW_TOKENS
    assert "must fit the model's 256 positions" in str(tokens(256 - spare - systems.LEAST_NEW_TOKENS + 1))


def test_what_looks_like_a_marker_stays_text(loaded, monkeypatch):
    """In every system; a marker in a question would open a step."""
    seen: list[int] = []
    for system in loaded.values():
        generate = system.model.generate

        def spy(*, input_ids: torch.Tensor, generate: Any = generate, **options: Any) -> Any:
            seen.extend(input_ids.reshape(-1).tolist())
            return generate(input_ids=input_ids, **options)

        monkeypatch.setattr(system.model, "generate", spy)
        system.answer([[{"role": "user", "content": HOSTILE}]], SHORT)
        markers = set(system.vocabulary.marker_ids) if system.vocabulary else set()
        assert seen
        assert not markers & set(seen)
        assert seen.count(system.codec.stop_id) == 1  # the template's own
        seen.clear()


@pytest.mark.parametrize("kind", ["base", "mote"])
def test_seeded_answers_depend_on_seed_dialogue_and_draw_alone(loaded, kind):
    system, asked = loaded[kind], questions(6)
    settings = Settings(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=7)
    answers = system.answer(asked, settings)
    assert system.answer(asked[::-1], settings) == answers[::-1]
    assert system.answer(asked[2:3], settings) == answers[2:3]
    for other in (Settings(**vars(settings) | {"draw": 2}), Settings(**vars(settings) | {"seed": 8})):
        assert all(a.texts != b.texts for a, b in zip(answers, system.answer(asked, other), strict=True))


def test_sampling_leaves_the_callers_random_state_alone(loaded):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    loaded["base"].answer([HI], Settings(max_new_tokens=8, temperature=1.0, seed=1))
    assert torch.rand(1) == expected


# --- what can be loaded ---------------------------------------------------------------------------------------------


def test_paths_are_made_absolute(folders, monkeypatch):
    monkeypatch.chdir(folders)
    spec = find_system("mote", "base")
    assert spec == SystemSpec(str(folders / "mote"), str(folders / "base"))
    assert find_system(str(folders / "mote")) == spec
    assert find_system("base") == SystemSpec(str(folders / "base"))
    assert systems.vocabulary_of(find_system("base")) is None
    for kind in ("mote", "lora"):
        vocabulary = systems.vocabulary_of(find_system(kind))
        assert vocabulary is not None
        assert vocabulary.steps == STEPS


def test_what_is_no_system_is_refused(folders, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path), str(tmp_path / "gone"), "no/such/model", "", "."):
        with pytest.raises(ValueError, match=r"model must be a folder with adapter_config.json or config.json"):
            find_system(name)
    with pytest.raises(ValueError, match="base_model must come with an adapter; got 'x'"):
        find_system(str(folders / "base"), "x")


def test_a_base_model_without_a_template_is_refused(tmp_path):
    tokenizer = tiny_tokenizer(())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model must have a chat template"):
        System(find_system(str(tmp_path)))


@pytest.mark.parametrize(
    ("value", "check", "message"),
    [
        ("analysys+response", False, "'analysys'"),
        (["analysis"], False, "steps must hold the answer step 'response'"),
        (["response", "analysis"], False, "steps must follow the order"),
        ("", False, "''"),
        (5, False, "steps must be a mode or the names of steps; got 5"),
        ("adaptive", True, "check must name a trained step"),
    ],
)
def test_steps_that_a_system_lacks_are_refused(loaded, value, check, message):
    with pytest.raises(ValueError, match=message):
        systems.parse_steps(value, loaded["mote"].vocabulary, check)


def test_steps_and_base_models(loaded):
    assert systems.parse_steps(None, None, False) is None
    assert systems.parse_steps(None, loaded["mote"].vocabulary, False) == "adaptive"
    assert systems.parse_steps(["analysis", "response"], loaded["mote"].vocabulary, False) == ("analysis", "response")
    with pytest.raises(ValueError, match="steps must be left out for a base model, which has no steps; got 'adaptive'"):
        systems.parse_steps("adaptive", None, False)
    with pytest.raises(ValueError, match="check must be left out for a base model"):
        loaded["base"].answer([HI], Settings(check=True))


# --- one copy, many who ask -----------------------------------------------------------------------------------------


class Fake:
    """A system that notes its batches; it can be held, and fails on the word "fail"."""

    def __init__(self, held: bool = False) -> None:
        self.batches: list[list[str]] = []
        self.loads = 0
        self.running, self.go_on = threading.Event(), threading.Event()
        self.stopped = False
        if not held:
            self.go_on.set()

    def load(self, _: SystemSpec) -> Fake:
        self.loads += 1
        return self

    def answer(self, dialogues: Any, settings: Settings, stop: Any) -> list[Any]:
        texts = [messages[0]["content"] for messages in dialogues]
        self.batches.append(texts)
        self.running.set()
        while not self.go_on.wait(0.005):
            if stop():
                self.stopped = True
                break
        if "fail" in texts:
            raise RuntimeError("out of memory")
        return [ValueError("too long") if text == "long" else text for text in texts]


def ask(system: SharedSystem, *texts: str, settings: Settings = SHORT, batch_size: int = 4) -> list[Any]:
    return [system.submit([{"role": "user", "content": text}], settings, batch_size) for text in texts]


SPEC = SystemSpec("fake")


def test_questions_are_gathered_into_full_batches():
    fake = Fake()
    system = SharedSystem(SPEC, fake.load)
    futures = ask(system, *"abcdefghij")
    assert [future.result(10) for future in futures] == list("abcdefghij")
    assert fake.batches == [list("abcd"), list("efgh"), list("ij")]
    assert fake.loads == 1
    system.close()


def test_a_late_question_joins_an_incomplete_batch_and_does_not_hold_it_up():
    fake = Fake()
    system = SharedSystem(SPEC, fake.load)
    first = ask(system, "a")
    second = ask(system, "b")
    wait(first + second, 10)
    assert fake.batches == [["a", "b"]]
    system.close()


def test_questions_with_other_settings_are_answered_apart_and_none_starves():
    fake = Fake()
    system = SharedSystem(SPEC, fake.load)
    other = Settings(steps="verify")
    futures = [
        future for text in "abcdefgh" for future in ask(system, text, settings=other if text in "bdfh" else SHORT)
    ]
    wait(futures, 10)
    assert fake.batches == [list("aceg"), list("bdfh")]
    system.close()


def test_an_error_reaches_those_who_asked_and_no_one_else():
    fake = Fake()
    system = SharedSystem(SPEC, fake.load)
    failed = ask(system, "a", "fail", "c", "long")
    for future in failed:
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(10)
    fine, refused = ask(system, "a", "long")
    assert fine.result(10) == "a"
    with pytest.raises(ValueError, match="too long"):
        refused.result(10)
    system.close()


def test_a_model_that_cannot_be_loaded_is_tried_again():
    fake, attempts = Fake(), []

    def load(spec: SystemSpec) -> Fake:
        attempts.append(spec)
        if len(attempts) == 1:
            raise OSError("no space left")
        return fake

    system = SharedSystem(SPEC, load)
    for future in ask(system, "a", "b"):
        with pytest.raises(OSError, match="no space left"):
            future.result(10)
    assert ask(system, "c")[0].result(10) == "c"
    system.close()


def test_one_system_is_loaded_at_a_time():
    """transformers and peft patch torch while they load: two loads at once left weights on the meta device."""
    fake, at_once, most = Fake(), [], []

    def load(spec: SystemSpec) -> Fake:
        at_once.append(spec)
        most.append(len(at_once))
        time.sleep(0.05)
        at_once.remove(spec)
        return fake

    several = [SharedSystem(SystemSpec(str(number)), load) for number in range(4)]
    futures = [ask(system, "a")[0] for system in several]
    assert [future.result(10) for future in futures] == ["a"] * 4
    assert most == [1] * 4
    for system in several:
        system.close()


def test_systems_that_are_asked_at_once_are_loaded_whole(folders, loaded):
    several = {kind: systems.acquire(find_system(str(folders / kind))) for kind in loaded}
    futures = {kind: system.submit(HI, SHORT) for kind, system in several.items()}
    for kind, future in futures.items():
        assert future.result(60) == loaded[kind].answer([HI], SHORT)[0]


def test_who_leaves_before_the_batch_is_not_answered():
    fake = Fake(held=True)
    system = SharedSystem(SPEC, fake.load)
    running = ask(system, *"abcd")
    assert fake.running.wait(10)
    waiting = ask(system, *"efgh")
    waiting[1].cancel()
    running[0].cancel()  # the others of its batch go on
    time.sleep(0.05)
    assert not fake.stopped
    fake.go_on.set()
    assert [future.result(10) for future in [*running[1:], *waiting[:1], *waiting[2:]]] == list("bcdegh")
    assert fake.batches == [list("abcd"), list("egh")]
    system.close()


def test_a_batch_that_nobody_waits_for_ends():
    fake = Fake(held=True)
    system = SharedSystem(SPEC, fake.load)
    futures = ask(system, *"abcd")
    assert fake.running.wait(10)
    for future in futures:
        future.cancel()
    after = ask(system, "e")
    fake.go_on.wait(0.5)
    assert fake.stopped
    fake.go_on.set()
    assert after[0].result(10) == "e"
    system.close()


def test_closing_ends_what_runs_and_what_waits():
    fake = Fake(held=True)
    system = SharedSystem(SPEC, fake.load)
    futures = ask(system, *"abcdefgh")
    assert fake.running.wait(10)
    system.close()
    assert fake.stopped
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(10)
    with pytest.raises(RuntimeError, match="must be open to be asked"):
        ask(system, "i")
    system.close()


def test_generation_stops_at_the_next_token(loaded):
    """The real one: many tokens are asked for, few are generated."""
    for kind, system in loaded.items():
        calls: list[int] = []

        def stop(calls: list[int] = calls) -> bool:
            calls.append(1)
            return len(calls) >= 5

        system.answer([HI, HI], Settings(max_new_tokens=2000, steps=None if kind == "base" else STEPS), stop)
        assert len(calls) == 5, kind


def test_one_copy_serves_all_and_is_freed_with_its_last_user(folders):
    spec = find_system(str(folders / "mote"))
    one, two = systems.acquire(spec), systems.acquire(find_system(str(folders / "mote")))
    other = systems.acquire(find_system(str(folders / "base")))
    assert one is two
    assert other is not one
    made: list[Any] = []
    load = one._load
    one._load = lambda spec: made.append(load(spec)) or made[-1]
    futures = [
        system.submit(HI, Settings(steps=steps, max_new_tokens=16))
        for system in (one, two)
        for steps in ("adaptive", "verify", STEPS)
    ]
    before = [future.result(60).texts for future in futures]
    assert before[:3] == before[3:]
    assert len(made) == 1
    model, thread = weakref.ref(made.pop().model), one._thread
    systems.release(one)
    gc.collect()
    assert model() is not None
    systems.release(two)
    assert thread is not None
    assert not thread.is_alive()
    assert model() is None
    assert not other.closed
    systems.release(two)  # once too often
    again = systems.acquire(spec)
    assert again is not one
    assert again.submit(HI, Settings(steps="adaptive", max_new_tokens=16)).result(60).texts == before[0]


def test_many_threads_ask_at_once(folders):
    system = systems.acquire(find_system(str(folders / "mote")))
    asked = questions(6)
    alone = [system.submit(messages, SHORT).result(60) for messages in asked]
    found: dict[int, Any] = {}

    def one(number: int) -> None:
        found[number] = system.submit(asked[number], SHORT).result(60)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(6)] == alone
