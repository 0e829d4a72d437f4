"""``axolotl mote generate``: streaming, resuming, and what stands in a line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner
from kit import STEPS, save_adapter, tiny_model, tiny_mote
from transformers import AutoTokenizer

from axolotl_mote.chain.questions import Question
from axolotl_mote.chain.result import refused_row
from axolotl_mote.chain.steps import validate_steps
from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.cli.generate import command
from axolotl_mote.generation import answers, runner
from axolotl_mote.generation.answers import AnswerFile
from axolotl_mote.generation.loading import codec_for, load_mote
from axolotl_mote.generation.runner import Runner, expand_modes, run_fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base model, an adapter on it, and the adapter's folder."""
    path = tmp_path_factory.mktemp("generate")
    model, tokenizer = tiny_mote((*STEPS, "check"))
    tiny_model().save_pretrained(path / "base")
    return save_adapter(model, tokenizer, path / "adapter", path / "base")


def write_questions(path: Path, count: int, **columns) -> Path:
    rows = (
        {"messages": [{"role": "user", "content": f"Question {n}?"}], "id": f"q{n}"} | columns for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder: Path, source: Path, output: Path, *options: str, code: int = 0):
    arguments = ["--adapter", str(folder), "--input", str(source), "--output", str(output), "--max-new-tokens", "24"]
    result = CliRunner().invoke(command, [*arguments, *options])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_hold_chain_and_input(folder, tmp_path):
    theirs = {"response": "the reference", "check": "safe", "error": "of the source", "input": "x", "attempts": [1]}
    source = write_questions(tmp_path / "q.jsonl", 5, topic="none", **theirs)
    run(folder, source, tmp_path / "out.jsonl", "--batch-size", "2")
    written = lines(tmp_path / "out.jsonl")
    assert [line["row"] for line in written] == [1, 2, 3, 4, 5]
    assert [line["id"] for line in written] == [f"q{n}" for n in range(5)]
    for line in written:
        assert line["mode"] == "adaptive"
        assert line["valid"]
        assert line["topic"] == "none"
        assert line["input"] == theirs
        assert line["check"] is None
        assert line["error"] is None
        assert line["attempts"] == []
        assert line["response"] != "the reference"
        assert set(line["token_counts"]) == set(line["steps"])
        assert [name for name in (*STEPS, "check") if line[name] is not None] == line["steps"]


def test_plain_prompts_and_all_modes(folder, tmp_path):
    source = tmp_path / "q.jsonl"
    source.write_text('{"prompt": "One?"}\n\n{"question": "Two?"}\n')
    result = run(folder, source, tmp_path / "out.jsonl", "--steps", "all", "--json", "--max-new-tokens", "48")
    summary = json.loads(result.stdout)
    assert list(summary) == [
        "response",
        "analysis+response",
        "analysis+guidance+response",
        "adaptive",
        "verify",
    ]
    assert all(figures["rows"] == 2 for figures in summary.values())
    assert summary["analysis+response"]["rows_with_step"] == {"analysis": 2, "response": 2}
    assert sum(summary["verify"]["verdicts"].values()) == 2
    by_mode = {line["mode"]: line for line in lines(tmp_path / "out.jsonl")}
    assert by_mode["analysis+guidance+response"]["steps"] == list(STEPS)
    assert by_mode["verify"]["attempts"]
    assert {line["row"] for line in lines(tmp_path / "out.jsonl")} == {1, 3}


def test_second_run_changes_nothing(folder, tmp_path):
    source = write_questions(tmp_path / "q.jsonl", 4)
    run(folder, source, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    assert "holds 4 answers" in run(folder, source, tmp_path / "out.jsonl").output
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("sample", [[], ["--sample", "--seed", "3"]], ids=["greedy", "sampled"])
def test_resuming_at_any_byte_gives_the_same_lines(folder, tmp_path, sample):
    """The process may die at any byte of a write; the rest is done again and nothing else."""
    source = write_questions(tmp_path / "q.jsonl", 6)
    run(folder, source, tmp_path / "whole.jsonl", "--batch-size", "2", *sample)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, ends[0] // 2, ends[1], ends[1] + 1, ends[3] - 1, len(whole) - 1):
        out = tmp_path / f"cut{cut}.jsonl"
        out.write_bytes(whole[:cut])
        run(folder, source, out, "--batch-size", "2", *sample)
        resumed = lines(out)
        assert sorted(line["row"] for line in resumed) == list(range(1, 7))
        if not sample:
            assert resumed == lines(tmp_path / "whole.jsonl")
        elif cut in (0, ends[1]):
            # A batch that was torn apart is sampled again; whole batches repeat exactly.
            assert resumed == lines(tmp_path / "whole.jsonl")


def test_killed_run_resumes(folder, tmp_path):
    """kill -9 in the middle of 150 questions; then let it finish: every row once."""
    source = write_questions(tmp_path / "q.jsonl", 150)
    out = tmp_path / "out.jsonl"
    arguments = ["--adapter", str(folder), "--input", str(source), "--output", str(out), "--max-new-tokens", "24"]
    program = "import sys; from axolotl_mote.cli.generate import command; command(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--batch-size", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if out.exists() and out.read_bytes().count(b"\n") >= 6:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "finished before it could be killed"
    assert 6 <= out.read_bytes().count(b"\n") < 150
    run(folder, source, out, "--batch-size", "50")
    assert sorted(line["row"] for line in lines(out)) == list(range(1, 151))


def test_a_thousand_questions_stream_in_constant_memory(folder, tmp_path):
    """Every row carries 20 kB: 20 MB pass through, and the peak does not grow by even a tenth of it."""
    source = write_questions(tmp_path / "q.jsonl", 1000, payload="x" * 20_000)
    model, tokenizer = load_mote(folder)
    modes = expand_modes(["response"], codec_for(model, tokenizer).vocabulary)
    with AnswerFile(tmp_path / "out.jsonl", tuple(modes), "r") as out:
        batches = Runner(model, tokenizer, modes, out, {"max_new_tokens": 6, "step_limits": None})
        windows = answers.windows(answers.read_questions(source), 100)
        batches.answer(next(windows))
        tracemalloc.start()
        batches.answer(next(windows))
        _, early = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for window in windows:
            batches.answer(window)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak - early < 2_000_000, (early, peak)
    with (tmp_path / "out.jsonl").open() as file:
        assert [json.loads(line)["row"] for line in file] == list(range(1, 1001))


def test_other_settings_are_not_mixed_into_a_file(folder, tmp_path):
    source = write_questions(tmp_path / "q.jsonl", 2)
    run(folder, source, tmp_path / "out.jsonl")
    refused = run(folder, source, tmp_path / "out.jsonl", "--step-limit", "analysis=3", code=1)
    assert "must come from the same adapter, steps, limits and file format" in refused.output
    run(folder, source, tmp_path / "out.jsonl", "--step-limit", "analysis=3", "--overwrite")
    assert len(lines(tmp_path / "out.jsonl")) == 2


def test_answers_to_other_questions_are_refused(folder, tmp_path):
    source, out = write_questions(tmp_path / "q.jsonl", 3), tmp_path / "out.jsonl"
    run(folder, source, out)
    rows = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*rows, rows[0]]))
    run(folder, source, out)  # rows may be added
    assert len(lines(out)) == 4
    source.write_text("".join(reversed(rows)))
    before = out.read_bytes()
    assert "row 1 of the input has changed" in run(folder, source, out, code=1).output
    assert "only modes of this run" in run(folder, source, out, "--steps", "response", code=1).output
    assert out.read_bytes() == before


def test_overwrite_deletes_nothing_until_all_is_loaded(folder, tmp_path):
    source, out = write_questions(tmp_path / "q.jsonl", 1), tmp_path / "out.jsonl"
    run(folder, source, out)
    before = out.read_bytes()
    run(folder, source, out, "--overwrite", "--steps", "thinking,response", code=1)
    run(folder, source, out, "--overwrite", "--base-model", str(tmp_path / "none"), code=1)
    with AnswerFile(out, ("adaptive",), lines(out)[0]["run"]):
        run(folder, source, out, "--overwrite", code=1)
    assert out.read_bytes() == before


def test_the_fingerprint_ignores_the_order_of_target_modules(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["target_modules"].reverse()
    (copy / "adapter_config.json").write_text(json.dumps(config))
    settings = (None, "auto", {}, None, 8, False)
    same = run_fingerprint(folder, *settings)
    assert run_fingerprint(copy, *settings) == same
    config["r"] += 1
    (copy / "adapter_config.json").write_text(json.dumps(config))
    assert run_fingerprint(copy, *settings) != same


def test_the_fingerprint_notices_another_base_model_and_template(folder, tmp_path):
    base = shutil.copytree(folder.parent / "base", tmp_path / "base")
    adapter = shutil.copytree(folder, tmp_path / "adapter")
    settings = (str(base), "auto", {}, None, 8, False)
    seen = {run_fingerprint(adapter, *settings)}
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    seen.add(run_fingerprint(adapter, *settings))
    (adapter / "chat_template.jinja").write_text("another")
    seen.add(run_fingerprint(adapter, *settings))
    assert len(seen) == 3


def test_no_step_may_be_named_like_a_column():
    vocabulary = StepVocabulary(STEPS, (1, 3, 5), (2, 4, 6))
    columns = answers.answer_row(Question([], 1, {"row": 1}), "m", "r", refused_row(vocabulary, "too long"))
    for name in set(columns) - {*STEPS, "check"}:
        with pytest.raises(ValueError, match="must not hold"):
            validate_steps([name, "response"])


def test_files_that_number_rows_from_0_are_refused(folder, tmp_path, monkeypatch):
    """Earlier versions did; an answer would be taken for that of the row before."""
    source, out = write_questions(tmp_path / "q.jsonl", 2), tmp_path / "out.jsonl"
    monkeypatch.setattr(runner, "FORMAT", 1)
    run(folder, source, out)
    monkeypatch.undo()
    before = out.read_bytes()
    refused = run(folder, source, out, code=1).output
    assert "file format" in refused
    assert "--overwrite" in refused
    assert out.read_bytes() == before
    out.write_text(json.dumps(lines(out)[0] | {"row": 0, "run": "r"}) + "\n")
    with pytest.raises(ValueError, match="got row 0"):
        AnswerFile(out, ("adaptive",), "r")


@pytest.mark.parametrize(
    "line", ["", "[1]", "{", '{"row": 1, "mode": "adaptive", "run": "r"}', '{"row": 1, "messages": [{}]}']
)
def test_a_file_of_something_else_is_left_alone(tmp_path, line):
    (tmp_path / "out.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="must be a file written by this command"):
        AnswerFile(tmp_path / "out.jsonl", ("adaptive",), "r")
    assert (tmp_path / "out.jsonl").read_text() == line + "\n"


@pytest.mark.parametrize("number", ["1" + "0" * 12, "9" * 30, "true", "1.0", "[1]"])
def test_a_row_number_that_no_file_has_is_refused(tmp_path, number):
    line = '{"row": %s, "mode": "m", "run": "r", "messages": [{"role": "user", "content": "?"}]}\n'
    (tmp_path / "out.jsonl").write_text(line % number)
    with pytest.raises(ValueError, match="must hold only modes of this run, m; got row"):
        AnswerFile(tmp_path / "out.jsonl", ("m",), "r")


def test_an_answer_whose_question_is_nested_too_deeply_is_refused(tmp_path, monkeypatch):
    def too_deep(messages):
        raise RecursionError

    line = json.dumps({"row": 1, "mode": "m", "run": "r", "messages": []}) + "\n"
    (tmp_path / "out.jsonl").write_text(line)
    monkeypatch.setattr("axolotl_mote.generation.answers.question_id", too_deep)  # the depth at which it fails varies
    with pytest.raises(ValueError, match="must be a file written by this command"):
        AnswerFile(tmp_path / "out.jsonl", ("m",), "r")


def test_an_answer_is_counted_once(tmp_path):
    line = json.dumps({"row": 1, "mode": "m", "run": "r", "messages": [{"role": "user", "content": "?"}]}) + "\n"
    (tmp_path / "out.jsonl").write_text(line * 2)
    with pytest.raises(ValueError, match="again at"):
        AnswerFile(tmp_path / "out.jsonl", ("m",), "r")


def test_forms_may_be_typed_with_plus_or_comma():
    vocabulary = StepVocabulary(STEPS, (1, 3, 5), (2, 4, 6))
    for typed in ("analysis+response", "analysis,response", " analysis , response "):
        assert expand_modes([typed], vocabulary) == {"analysis+response": ["analysis", "response"]}


def test_two_processes_do_not_share_a_file(folder, tmp_path):
    source = write_questions(tmp_path / "q.jsonl", 1)
    with AnswerFile(tmp_path / "out.jsonl", ("adaptive",), "r"):
        assert "one process at a time" in run(folder, source, tmp_path / "out.jsonl", code=1).output


def test_faulty_rows_are_named_before_any_work(folder, tmp_path):
    source = tmp_path / "q.jsonl"
    rows = ['{"prompt": "fine"}', "{", '{"text": 1}', '{"messages": [{"role": "assistant", "content": "x"}]}', "[1]"]
    rows += [
        '{"prompt": "half \\ud83d"}',
        '{"messages": [{"role": "user<|response|>", "content": "x"}]}',
        '{"messages": "text"}',
    ]
    source.write_text("\n".join(rows))
    output = run(folder, source, tmp_path / "out.jsonl", code=1).output
    assert [row for row in range(10) if f"row {row}:" in output] == [2, 3, 4, 5, 6, 7, 8]
    assert not (tmp_path / "out.jsonl").exists()


def test_what_the_template_refuses_gets_its_own_line(folder, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    strict = tmp_path / "strict"
    shutil.copytree(folder, strict)
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(strict)
    source = tmp_path / "q.jsonl"
    user = {"role": "user", "content": "?"}
    rows = [[user], [{"role": "system", "content": "Be kind."}, user], [user]]
    source.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    run(strict, source, tmp_path / "out.jsonl")
    errors = [row["error"] for row in lines(tmp_path / "out.jsonl")]
    assert errors[0] is errors[2] is None
    assert "System role not supported" in errors[1]


def test_the_input_is_not_overwritten(folder, tmp_path):
    source = write_questions(tmp_path / "q.jsonl", 2)
    before = source.read_text()
    assert "must not be the input" in run(folder, source, source, "--overwrite", code=1).output
    assert source.read_text() == before


def test_too_long_a_question_gets_its_own_refusal(folder, tmp_path):
    source = tmp_path / "q.jsonl"
    rows = [{"prompt": "short"}, {"prompt": "long " * 1000, "response": "reference"}, {"prompt": "short again"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads(run(folder, source, tmp_path / "out.jsonl", "--json").stdout)
    assert summary["adaptive"]["refused"] == 1
    written = lines(tmp_path / "out.jsonl")
    assert "4096" in written[1]["error"]
    assert not written[1]["finished"]
    assert [written[1][name] for name in (*STEPS, "check")] == [None] * 4
    assert written[1]["input"] == {"response": "reference"}
    assert set(written[0]) == set(written[1]) - {"input"}
    assert written[2]["error"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "response,analysis"], "must follow the order"),
        (["--steps", "thinking,response"], "must name steps of this adapter"),
        (["--step-limit", "x"], "--step-limit must be N once"),
        (["--step-limit", "3", "--step-limit", "analysis=2"], "--step-limit must be N once"),
        (["--temperature", "0.5"], "must come with --sample"),
    ],
)
def test_wrong_options_are_one_line(folder, tmp_path, options, message):
    source = write_questions(tmp_path / "q.jsonl", 1)
    result = run(folder, source, tmp_path / "out.jsonl", *options, code=1)
    assert message in result.output
    assert "Traceback" not in result.output


def test_surrogate_halves_survive(tmp_path):
    with AnswerFile(tmp_path / "out.jsonl", ("m",), "r") as out:
        out.append([{"row": 1, "mode": "m", "run": "r", "response": "bad \ud83d half"}])
    assert lines(tmp_path / "out.jsonl")[0]["response"] == "bad \ud83d half"


@pytest.mark.parametrize(("depth", "code"), [(150, 0), (700, 1), (940, 1), (10**5, 1)])
def test_deeply_nested_columns_are_refused_before_any_work(folder, tmp_path, depth, code):
    """What can be read at one depth of calls cannot be written at another."""
    source = tmp_path / "q.jsonl"
    source.write_text('{"prompt": "fine"}\n{"prompt": "?", "kept": ' + "[" * depth + "]" * depth + "}\n")
    output = run(folder, source, tmp_path / "out.jsonl", code=code).output
    if code:
        assert "row 2: " in output
        assert "nested" in output
        assert not (tmp_path / "out.jsonl").exists()
    else:
        assert len(lines(tmp_path / "out.jsonl")) == 2


@pytest.fixture
def full_disk():
    """The operating system refuses to let any file grow beyond so many bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_loses_nothing(folder, tmp_path, full_disk):
    source, out = write_questions(tmp_path / "q.jsonl", 6), tmp_path / "out.jsonl"
    run(folder, source, tmp_path / "whole.jsonl", "--batch-size", "2")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    full_disk(len(whole) // 2)
    refused = run(folder, source, out, "--batch-size", "2", code=1)
    assert str(out) in refused.output
    assert "File too large" in refused.output
    assert "run the same command " in " ".join(refused.output.split())
    assert whole.startswith(out.read_bytes())
    assert out.read_bytes().endswith(b"\n")
    full_disk(resource.RLIM_INFINITY)
    run(folder, source, out, "--batch-size", "2")
    assert out.read_bytes() == whole
