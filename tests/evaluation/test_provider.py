"""``mote/DIR`` as inspect_ai sees it: the text of ``generate_chain``, whatever else is asked at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

import anyio
from inspect_ai import Task, eval, task
from inspect_ai.dataset import Sample
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)
from inspect_ai.tool import ToolInfo
from kit import STEPS
from systems_kit import HOSTILE, questions, write_systems

from axolotl_mote.evaluation import systems
from axolotl_mote.evaluation.provider import MoteAPI, dialogue_of
from axolotl_mote.generation import generate_chain, load_mote

TOKENS = 16
MODES = {
    "adaptive": "adaptive",
    "verify": "verify",
    "response": ["response"],
    "analysis+response": ["analysis", "response"],
    "analysis+guidance+response": list(STEPS),
}
KINDS = {"user": ChatMessageUser, "assistant": ChatMessageAssistant, "system": ChatMessageSystem}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_systems(tmp_path_factory.mktemp("provider"))


@pytest.fixture(scope="module")
def loaded(folders: Path) -> Any:
    return load_mote(folders / "mote")


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    systems.release_all()


def model(folder: Path, **arguments: Any) -> Model:
    return get_model(f"mote/{folder}", memoize=False, **{"max_new_tokens": TOKENS} | arguments)


def messages(dialogue: Sequence[dict[str, str]]) -> list[Any]:
    return [KINDS[turn["role"]](content=turn["content"]) for turn in dialogue]


async def gather(calls: Sequence[Any]) -> list[Any]:
    """Results of coroutines that run at once, or the errors they raised."""
    results: list[Any] = [None] * len(calls)

    async def one(number: int) -> None:
        try:
            results[number] = await calls[number]
        except (ValueError, RuntimeError) as error:
            results[number] = error

    async with anyio.create_task_group() as group:
        for number in range(len(calls)):
            group.start_soon(one, number)
    return results


def ask(model: Model, dialogues: Sequence[Any], *configs: GenerateConfig) -> list[Any]:
    """Answers to dialogues that are asked at once, each with its config."""
    configs = configs or (GenerateConfig(),)

    async def run() -> list[Any]:
        calls = [
            model.generate(messages(dialogue), config=config)
            for dialogue, config in zip(dialogues, configs * (len(dialogues) // len(configs)), strict=True)
        ]
        results = await gather(calls)
        await model.api.aclose()
        return results

    return anyio.run(run)


def same(output: ModelOutput, chain: Any) -> bool:
    """Whether an output is a chain."""
    assert isinstance(output, ModelOutput), output
    facts = output.metadata["mote"]
    *reasoning, answer = output.message.content
    assert [part.internal["step"] for part in reasoning] == [name for name in chain.steps if name != "response"]
    assert output.usage.output_tokens == chain.spent
    assert output.usage.total_tokens == output.usage.input_tokens + chain.spent
    assert output.usage.reasoning_tokens == sum(chain.token_counts[part.internal["step"]] for part in reasoning)
    assert output.stop_reason == ("max_tokens" if chain.truncated else "stop")
    assert facts["has_steps"] is True
    assert (facts["finished"], facts["check"]) == (chain.finished, chain.check)
    assert facts["token_counts"] == chain.token_counts
    return (
        isinstance(answer, ContentText)
        and all(isinstance(part, ContentReasoning) for part in reasoning)
        and output.completion == answer.text == chain.answer
        and [part.reasoning for part in reasoning] == [chain.texts[part.internal["step"]] for part in reasoning]
        and facts["texts"] == chain.texts
        and facts["steps"] == list(chain.steps)
    )


@pytest.mark.parametrize("mode", MODES)
def test_text_is_that_of_generate_chain_for_32_questions(folders, loaded, mode):
    asked = questions(32)
    outputs = ask(model(folders / "mote", steps=mode), asked)
    chains = generate_chain(*loaded, asked, MODES[mode], TOKENS)
    assert all(same(output, chain) for output, chain in zip(outputs, chains, strict=True))


def test_modes_of_one_run_share_one_copy(folders, loaded, monkeypatch):
    """By sample and by model; inspect_ai gives ``-M steps=analysis,response`` as a list."""
    loads: list[Any] = []
    load = systems.load_mote
    monkeypatch.setattr(systems, "load_mote", lambda *a, **k: loads.append(a) or load(*a, **k))
    one = model(folders / "mote", steps=["analysis", "response"])
    two = model(folders / "mote")
    asked = questions(8)
    configs = [GenerateConfig(extra_body={"steps": mode}) for mode in MODES]

    async def run() -> list[Any]:
        calls = [one.generate(messages(dialogue)) for dialogue in asked]
        calls += [two.generate(messages(dialogue), config=config) for config in configs for dialogue in asked]
        return await gather(calls)

    outputs = anyio.run(run)
    wanted = [["analysis", "response"], *MODES.values()]
    chains = [chain for mode in wanted for chain in generate_chain(*loaded, asked, mode, TOKENS)]
    assert all(same(output, chain) for output, chain in zip(outputs, chains, strict=True))
    assert len(loads) == 1


def test_a_question_that_fails_takes_no_other_with_it(folders, loaded):
    asked = questions(7)
    long = [{"role": "user", "content": "x" * 5000}]
    outputs = ask(model(folders / "mote"), [*asked[:3], long, *asked[3:]])
    failed = outputs.pop(3)
    assert isinstance(failed, ValueError)
    assert "must fit the model's 4096 positions" in str(failed)
    chains = generate_chain(*loaded, asked, "adaptive", TOKENS)
    assert all(same(output, chain) for output, chain in zip(outputs, chains, strict=True))


def test_who_is_cancelled_leaves_and_no_one_else_is_disturbed(folders, loaded):
    one, asked = model(folders / "mote"), questions(24)
    outputs: dict[int, Any] = {}

    async def run() -> None:
        async def call(number: int, scope: anyio.CancelScope) -> None:
            with scope:
                outputs[number] = await one.generate(messages(asked[number]))

        scopes = [anyio.CancelScope() for _ in asked]
        async with anyio.create_task_group() as group:
            for number, scope in enumerate(scopes):
                group.start_soon(call, number, scope)
            for number in range(0, 24, 3):  # some before they are asked, some while they wait, some while they run
                await anyio.sleep(0.01)
                scopes[number].cancel()
        with anyio.move_on_after(0.05):  # a whole batch is left while it runs
            await one.generate(messages(HI), config=GenerateConfig(max_tokens=4000, extra_body={"steps": list(STEPS)}))
        with anyio.fail_after(20):
            outputs[24] = await one.generate(messages(HI))

    anyio.run(run)
    chains = generate_chain(*loaded, [*asked, HI], "adaptive", TOKENS)
    assert {number for number in range(25) if number == 24 or number % 3} <= set(outputs)
    assert all(same(output, chains[number]) for number, output in outputs.items())


def test_closing_frees_the_model_and_the_next_question_loads_it_again(folders):
    one = model(folders / "mote")
    first = ask(one, [HI])[0]
    assert not systems._systems
    assert ask(one, [HI])[0].completion == first.completion
    with one:
        anyio.run(lambda: one.generate(messages(HI)))
        assert len(systems._systems) == 1
    assert not systems._systems
    one.api.close()


def test_closing_while_questions_wait(folders):
    one = model(folders / "mote")

    async def run() -> list[Any]:
        async def close() -> None:
            await anyio.sleep(0.1)
            await one.api.aclose()

        async with anyio.create_task_group() as group:
            group.start_soon(close)
            with anyio.fail_after(30):
                return await gather([one.generate(messages(q), config=long) for q in questions(16)])

    long = GenerateConfig(max_tokens=3000, extra_body={"steps": list(STEPS)})
    results = anyio.run(run)
    assert all("it was released. Ask again." in str(result) for result in results)
    assert not systems._systems


# --- dialogues ------------------------------------------------------------------------------------------------------


def test_history_holds_answers_without_their_reasoning(folders, loaded):
    one = model(folders / "mote", steps="analysis+response")
    question = [{"role": "system", "content": "Be brief."}, *HI]

    async def run() -> list[ModelOutput]:
        first = await one.generate(messages(question))
        history = [*messages(question), first.message, ChatMessageUser(content="why?")]
        return [first, await one.generate(history)]

    first, second = anyio.run(run)
    assert isinstance(first.message.content[0], ContentReasoning)
    turns = [*question, {"role": "assistant", "content": first.completion}, {"role": "user", "content": "why?"}]
    assert same(second, generate_chain(*loaded, turns, ["analysis", "response"], TOKENS))


def test_hostile_text_and_system_messages_of_the_config(folders, loaded):
    turns = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE + "\x00\u2028\u200b\ufeff"}]
    output = ask(model(folders / "mote"), [turns[1:]], GenerateConfig(system_message=HOSTILE))[0]
    assert same(output, generate_chain(*loaded, turns, "adaptive", TOKENS))


@pytest.mark.parametrize(
    ("input", "message"),
    [
        ([ChatMessageTool(content="x", tool_call_id="1")], r"role must be one of .*; got 'tool' at message 0"),
        ([ChatMessageUser(content=[ContentImage(image="data:")])], "content must be text; got image at message 0"),
    ],
)
def test_what_is_not_text_is_refused(input, message):
    with pytest.raises(ValueError, match=message):
        dialogue_of(input)


def test_an_answer_of_reasoning_alone_is_refused(folders):
    thought = ChatMessageAssistant(content=[ContentReasoning(reasoning="hm")])
    with pytest.raises(ValueError, match=r"messages\[1\].content must be a non-empty string"):
        anyio.run(model(folders / "mote").generate, [*messages(HI), thought, *messages(HI)])


# --- other systems --------------------------------------------------------------------------------------------------


def test_a_base_model_answers_without_steps(folders):
    asked = questions(12)
    outputs = ask(model(folders / "base"), asked)
    expected = systems.System(systems.find_system(str(folders / "base"))).answer(
        asked, systems.Settings(max_new_tokens=TOKENS)
    )
    for output, answer in zip(outputs, expected, strict=True):
        assert output.completion == answer.answer
        assert [part.type for part in output.message.content] == ["text"]
        assert output.metadata["mote"]["texts"] == {"response": answer.answer}
        assert output.metadata["mote"]["steps"] == ["response"]
        assert output.metadata["mote"]["has_steps"] is False
        assert output.stop_reason == ("max_tokens" if answer.truncated else "stop")
        assert output.usage.reasoning_tokens == 0


def test_a_base_model_that_thinks_gives_its_thoughts_apart(folders, monkeypatch):
    said = systems.Answer(
        texts={"reasoning": "A game.", "response": ""},
        token_counts={"reasoning": 5, "response": 0},
        answer_step="response",
        finished=False,
        truncated=("reasoning",),
        check=None,
        input_tokens=3,
        output_tokens=5,
    )
    monkeypatch.setattr(systems.System, "answer", lambda self, dialogues, *_: [said] * len(dialogues))
    (output,) = ask(model(folders / "base"), [HI])
    assert [part.type for part in output.message.content] == ["reasoning", "text"]
    assert (output.completion, output.stop_reason) == ("", "max_tokens")
    assert (output.usage.output_tokens, output.usage.reasoning_tokens) == (5, 5)


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_lora_answers_with_chains(folders, mode):
    asked = questions(4)
    outputs = ask(model(folders / "lora", steps=mode), asked)
    chains = generate_chain(*load_mote(folders / "lora"), asked, MODES[mode], TOKENS)
    assert all(same(output, chain) for output, chain in zip(outputs, chains, strict=True))


# --- settings -------------------------------------------------------------------------------------------------------


def test_a_cut_is_reported(folders):
    cut, fine = ask(
        model(folders / "mote", steps="analysis+guidance+response"),
        [HI, HI],
        GenerateConfig(max_tokens=9),
        GenerateConfig(max_tokens=200),
    )
    assert cut.stop_reason == "max_tokens"
    assert cut.metadata["mote"]["truncated"]
    assert cut.usage.output_tokens <= 9 < fine.usage.output_tokens


@pytest.mark.parametrize("kind", ["base", "mote"])
def test_a_seed_gives_the_same_answers_in_any_order(folders, kind):
    one, asked = model(folders / kind), questions(6)
    config = GenerateConfig(temperature=1.0, seed=5)
    outputs = [output.completion for output in ask(one, asked, config)]
    assert [output.completion for output in ask(one, asked[::-1], config)] == outputs[::-1]
    other = [output.completion for output in ask(one, asked, GenerateConfig(temperature=1.0, seed=6))]
    assert sum(a != b for a, b in zip(outputs, other, strict=True)) >= 4
    by_default = model(folders / kind, seed=5)
    assert [output.completion for output in ask(by_default, asked, GenerateConfig(temperature=1.0))] == outputs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stop_seqs": ["x"]}, "stop_seqs must be left out for mote/DIR; got .* A chain ends with its own marker"),
        ({"num_choices": 2}, "num_choices must be left out .* Use epochs"),
        ({"best_of": 2}, "best_of must be left out"),
        ({"logprobs": True}, "logprobs must be left out"),
        ({"frequency_penalty": 0.5}, "frequency_penalty must be left out"),
        ({"logit_bias": {5: 1.0}}, "logit_bias must be left out"),
        ({"reasoning_effort": "low"}, "reasoning_effort must be left out"),
        ({"top_p": 0.5}, "top_p must come with a temperature; got 0.5"),
        ({"top_k": 5}, "top_k must come with a temperature; got 5"),
        ({"temperature": -1.0}, "temperature must be at least 0; got -1.0"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1; got 0"),
        ({"max_tokens": 5}, "max_new_tokens must be at least"),
        ({"extra_body": {"step": "verify"}}, r"extra_body must hold steps or check; got \['step'\]"),
        ({"extra_body": {"steps": "analysis"}}, "steps must hold the answer step"),
        ({"extra_body": {"steps": 5}}, "steps must be a mode or the names of steps; got 5"),
        ({"extra_body": {"check": "no"}}, "check must be true or false; got 'no'"),
        ({"extra_body": {"check": True}}, "check must name a trained step"),
    ],
)
def test_what_cannot_be_honoured_is_refused(folders, config, message):
    one = model(folders / "mote", steps="analysis+guidance+response")
    with pytest.raises(ValueError, match=message):
        anyio.run(lambda: one.generate(messages(HI), config=GenerateConfig(**config)))


def test_values_that_ask_for_nothing_are_accepted(folders):
    config = GenerateConfig(num_choices=1, stop_seqs=[], logprobs=False, temperature=0, top_p=0.5, seed=3)
    one = model(folders / "mote")
    assert ask(one, [HI], config)[0].completion == ask(one, [HI])[0].completion


def test_tools_are_refused(folders):
    api = MoteAPI(str(folders / "mote"))
    tool = ToolInfo(name="search", description="Search.")
    with pytest.raises(ValueError, match=r"tools must be empty; got search"):
        anyio.run(api.generate, messages(HI), [tool], "auto", GenerateConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": "analysys"}, "'analysys'"),
        ({"stepz": "adaptive"}, "-M must name an argument of mote/DIR; got stepz"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"check": "yes"}, "check must be true or false"),
        ({"base_model": "/gone"}, "base_model must be a folder or a hub name; got '/gone'"),
        ({"base_url": "http://x"}, "base_url must be left out"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(folders, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(folders / "mote", **arguments)
    assert not systems._systems


def test_connections_suit_the_batches(folders):
    one = model(folders / "mote", batch_size=5)
    assert one.api.max_connections() == 10
    assert one.api.connection_key() == model(folders / "mote", steps="verify").api.connection_key()
    assert one.api.connection_key() != model(folders / "base").api.connection_key()


# --- evaluations ----------------------------------------------------------------------------------------------------


@task
def tiny_task(count: int = 6) -> Task:
    return Task(dataset=[Sample(input=messages(dialogue), id=n) for n, dialogue in enumerate(questions(count))])


def test_an_evaluation_keeps_texts_and_counts_in_its_log(folders, loaded, tmp_path):
    seeded = {"temperature": 1.0, "seed": 3, "display": "none", "epochs": 2}
    greedy = eval(tiny_task(), model=model(folders / "mote"), log_dir=str(tmp_path), display="none")[0]
    log = read_eval_log(greedy.location)
    assert log.status == "success"
    chains = generate_chain(*loaded, questions(6), "adaptive", TOKENS)
    assert all(same(sample.output, chains[sample.id]) for sample in log.samples)
    sampled = [
        {(s.id, s.epoch): s.output.completion for s in run.samples}
        for _ in range(2)
        for run in eval(tiny_task(), model=model(folders / "mote"), log_dir=str(tmp_path), **seeded)
    ]
    assert sampled[0] == sampled[1]
    assert sum(sampled[0][n, 1] != sampled[0][n, 2] for n in range(6)) >= 4


def test_inspect_eval_finds_the_provider_by_its_entry_point(folders, loaded, tmp_path):
    """With relative paths, from another folder than that of the task, which becomes the working directory."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.py").write_text(
        "from inspect_ai import Task, task\nfrom inspect_ai.dataset import Sample\n\n"
        "@task\ndef mine():\n    return Task(dataset=[Sample(input='hi'), Sample(input='ho')])\n"
    )
    (tmp_path / "outputs").symlink_to(folders)
    arguments = ["tasks/mine.py", "--model", "mote/outputs/mote", "--log-dir", "logs", "--display", "none"]
    options = ["-M", "steps=analysis,response", "-M", "base_model=outputs/base", "-M", f"max_new_tokens={TOKENS}"]
    done = subprocess.run(
        [Path(sys.executable).parent / "inspect", "eval", *arguments, *options],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = read_eval_log(str(next((tmp_path / "logs").glob("*.eval"))))
    asked = [[{"role": "user", "content": sample.input}] for sample in log.samples]
    chains = generate_chain(*loaded, asked, ["analysis", "response"], TOKENS)
    assert all(same(sample.output, chain) for sample, chain in zip(log.samples, chains, strict=True))


def test_registering_imports_no_torch():
    """inspect_ai imports the registry at every command."""
    probe = "import sys, axolotl_mote.evaluation.registry; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
