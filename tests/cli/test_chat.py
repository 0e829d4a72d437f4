"""``axolotl mote chat``: what a person sees, and what enters the dialogue."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from click.testing import CliRunner
from kit import STEPS, save_adapter, tiny_model, tiny_mote
from rich.console import Console

from axolotl_mote.cli.chat import ChatSession, command
from axolotl_mote.generation import StepStreamer, codec_for, generate_chain

SETTINGS = {"max_new_tokens": 24, "step_limits": None, "check": False, "seed": None}


@pytest.fixture(scope="module")
def mote():
    return tiny_mote()


def session(mote, steps="analysis+response", **options) -> tuple[ChatSession, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=200, highlight=False)
    return ChatSession(*mote, steps, dict(SETTINGS), console=console, **options), screen


def plain(screen: io.StringIO) -> str:
    """What the screen shows, without colors."""
    return re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())


def words(text: str) -> str:
    """Letters and digits alone: whatever the console does to white space."""
    return "".join(filter(str.isalnum, text))


def write_instead(monkeypatch, text: str) -> None:
    """Have the model write these markers and this text."""

    def generate(model, tokenizer, messages, steps, streamer, **_):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if streamer is None:
            return codec_for(model, tokenizer).parse(ids)
        for tokens in ([[0]], ids):  # the prompt, then the chain
            streamer.put(torch.tensor(tokens))
        streamer.end()
        return codec_for(model, tokenizer).parse(ids)

    monkeypatch.setattr("axolotl_mote.generation.api.generate_chain", generate)


def test_reasoning_is_dim_and_the_answer_plain(mote):
    chat, screen = session(mote)
    chat.run(iter(["hello"]))
    shown = screen.getvalue()
    assert "\x1b[2m" in shown[: shown.index("[analysis]")]
    answer = chat.messages[-1]["content"]
    tail = shown[shown.index("[analysis]") :]
    assert chat.messages[0] == {"role": "user", "content": "hello"}
    assert chat.messages[1]["role"] == "assistant"
    printable = [c for c in answer if c.isalnum()]
    assert all(c in tail for c in printable)
    assert "[response]" not in shown


def test_only_answers_enter_the_dialogue(mote):
    chat, _ = session(mote, "analysis,guidance,response", system="Be brief.")
    chat.run(iter(["one", "two"]))
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert all("<|" not in m["content"] for m in chat.messages)


def test_commands(mote):
    chat, screen = session(mote)
    chat.run(iter(["hello", "/reset", "/steps thinking", "/steps verify", "/reasoning", "/help", "/exit", "never"]))
    assert chat.messages == []
    assert chat.steps == "verify"
    assert not chat.show_reasoning
    assert "must name steps of this adapter" in screen.getvalue()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_blank_answer_does_not_lock_the_dialogue(mote, monkeypatch, capsys, as_json):
    write_instead(monkeypatch, "<|response|> \n<|/response|>")
    chat, screen = session(mote, "response", write_json=[].append if as_json else None)
    chat.run(iter(["hello"]))
    assert chat.messages == []
    said = capsys.readouterr().err if as_json else plain(screen)
    assert "left out of the dialogue" in said
    monkeypatch.undo()
    chat.run(iter(["hello again"]))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.messages[0]["content"] == "hello again"


def test_unknown_commands_are_not_sent_to_the_model(mote, monkeypatch):
    asked = []
    monkeypatch.setattr(ChatSession, "_answer", lambda self, text: asked.append(text))
    chat, screen = session(mote)
    chat.run(iter(["/quit", "/etc/passwd holds what?", "/", " /etc/passwd holds what?", "/exit now", "never"]))
    assert asked == ["/etc/passwd holds what?"]  # a space before it makes it a message
    assert plain(screen).count("is no command") == 3


def test_hidden_reasoning(mote):
    chat, screen = session(mote, show_reasoning=False)
    chat.run(iter(["hello"]))
    assert "[analysis]" not in screen.getvalue()


def test_cut_answers_and_verdicts_are_shown(mote):
    chat, screen = session(mote)
    chat.settings["step_limits"] = 1
    chat.run(iter(["hello", "/steps verify", "hello again"]))
    assert "unfinished" in screen.getvalue()
    assert "judged" in screen.getvalue()


def test_rejected_answers_are_not_shown(mote, monkeypatch):
    """Verify mode shows the final chain alone, whatever was tried before it."""
    monkeypatch.setattr(
        "axolotl_mote.generation.verify.BaseModelJudge", lambda *_: lambda dialogues, answers: ["unsafe"] * len(answers)
    )
    chat, screen = session(mote, "verify")
    chat.settings["max_new_tokens"] = 60
    chat.run(iter(["hello"]))
    before, _, chain = plain(screen).partition("\n[analysis] ")
    assert before.strip() == "Steps: analysis, guidance, response. /help lists the commands."
    assert re.findall(r"\[(\w+)\] ", chain) == ["guidance"]
    shown, judged, _ = chain.partition("\njudged unsafe")
    assert judged
    assert words(shown).endswith(words(chat.messages[-1]["content"]))


def test_too_long_a_message_is_refused_and_forgotten(mote):
    chat, screen = session(mote)
    chat.run(iter(["x" * 5000]))
    assert chat.messages == []
    assert "4096 positions" in screen.getvalue()


def test_control_characters_do_not_reach_the_terminal(mote, monkeypatch):
    write_instead(monkeypatch, "<|response|>a\x1b]0;title\x07\x9b31m\u202eb<|/response|>")
    chat, screen = session(mote, "response")
    chat.run(iter(["hello"]))
    assert "a]0;title31mb" in plain(screen)


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ("<|response|> \n<|/response|>", "the answer is blank"),
        ("<|analysis|>a<|/analysis|>b<|response|>c<|/response|>", "the model broke the form of a chain"),
        ("<|response|>cut", "the answer was cut at its limit"),
    ],
)
def test_an_unfinished_answer_says_why(mote, monkeypatch, chain, reason):
    write_instead(monkeypatch, chain)
    chat, screen = session(mote, "adaptive")
    chat.run(iter(["hello"]))
    assert f"(unfinished: {reason})" in plain(screen)


def test_streamed_text_equals_the_chain(mote):
    model, tokenizer = mote
    pieces: dict[str, str] = {}
    streamer = StepStreamer(codec_for(model, tokenizer), lambda s, t: pieces.__setitem__(s, pieces.get(s, "") + t))
    for _ in range(2):
        pieces.clear()
        chain = generate_chain(
            model, tokenizer, [{"role": "user", "content": "hi"}], list(STEPS), max_new_tokens=60, streamer=streamer
        )
        assert pieces == chain.texts


def test_characters_of_several_tokens_are_shown_whole(mote):
    model, tokenizer = mote
    codec = codec_for(model, tokenizer)
    vocabulary = codec.vocabulary
    seen: list[str] = []
    streamer = StepStreamer(codec, lambda _, text: seen.append(text))
    text = "é漢🙂"
    streamer.put(torch.tensor([[1, 2]]))
    for token in [vocabulary.start_ids[0], *tokenizer.encode(text, add_special_tokens=False), vocabulary.end_ids[0]]:
        streamer.put(torch.tensor([token]))
    assert seen == ["", "é", "漢", "🙂"]


def test_the_streamer_follows_the_rule(mote):
    """An end marker of another step closes nothing, a start marker ends the open step, text between is ignored."""
    codec = codec_for(*mote)
    pieces: list[tuple[str, str]] = []
    streamer = StepStreamer(codec, lambda step, text: pieces.append((step, text)))
    streamer.put(torch.tensor([[1, 2]]))
    text = "x<|analysis|>a<|/guidance|>b<|guidance|>c<|/guidance|>d<|/response|><|response|>e"
    streamer.put(torch.tensor(codec.tokenizer.encode(text, add_special_tokens=False)))
    streamer.end()
    shown: dict[str, str] = {}
    for step, piece in pieces:
        shown[step] = shown.get(step, "") + piece
    assert shown == {"analysis": "ab", "guidance": "c", "response": "e"}


def test_a_streamer_follows_one_dialogue(mote):
    streamer = StepStreamer(codec_for(*mote), lambda *_: None)
    dialogues = [[{"role": "user", "content": text}] for text in ("a", "b")]
    with pytest.raises(ValueError, match="one dialogue; got a batch of 2"):
        generate_chain(*mote, dialogues, streamer=streamer, max_new_tokens=12)


def test_piped_json(tmp_path):
    model, tokenizer = tiny_mote()
    tiny_model().save_pretrained(tmp_path / "base")
    folder = save_adapter(model, tokenizer, tmp_path / "adapter", tmp_path / "base")
    result = CliRunner().invoke(
        command, ["--adapter", str(folder), "--json", "--max-new-tokens", "20"], input="one\n\ntwo\n"
    )
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [a["question"] for a in answers] == ["one", "two"]
    assert all(a["valid"] for a in answers)


def test_not_an_adapter_folder(tmp_path):
    result = CliRunner().invoke(command, ["--adapter", str(tmp_path)])
    assert result.exit_code == 1
    assert "adapter must be a folder with adapter_config.json" in result.output


def test_interrupting_a_pipe_ends_it(mote, monkeypatch):
    """On a terminal Ctrl-C stops one answer; nobody is there to type the next line of a pipe."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("axolotl_mote.generation.api.generate_chain", interrupt)
    chat, _ = session(mote)
    with pytest.raises(KeyboardInterrupt):
        chat.run(iter(["one", "two"]))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    chat, screen = session(mote)
    chat.run(iter(["one", "two"]))
    assert plain(screen).count("Stopped") == 2
