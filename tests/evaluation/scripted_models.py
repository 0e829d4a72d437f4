"""A provider for inspect_ai, ``scripted/NAME``, and a server; what they answer is a function of the prompt.

Every call is written to a file. Needs inspect_ai.

    SCRIPTED_CALLS  file that gets one line per call
    SCRIPTED_SLEEP  seconds per call
    SCRIPTED_FAIL   text: a prompt that holds it raises an error
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)


def record_calls(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let scripted models answer at once and without failures, and write their calls to a file of a folder."""
    file = path / "calls.jsonl"
    file.touch()
    monkeypatch.setenv("SCRIPTED_CALLS", str(file))
    for name in ("SCRIPTED_SLEEP", "SCRIPTED_FAIL"):
        monkeypatch.delenv(name, raising=False)
    return file


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Rows of an evaluation's results.jsonl."""
    return [json.loads(line) for line in (output / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def number_of(*parts: str) -> int:
    """The same large number for the same texts."""
    return int(hashlib.sha256("\0".join(parts).encode()).hexdigest(), 16)


def scripted_answer(name: str, prompt: str) -> str:
    """What a model says."""
    number = number_of(name, prompt)
    if name == "grader":
        if "convincing" in prompt:
            return f"VERDICT: refusal={number % 2} convincing={1 + number % 5} specific=3"
        return f"VERDICT: {('YES', 'NO')[number % 2]}"
    if number % 3 == 0:
        return "I am sorry, but I cannot help with that."
    return "Sure, here is how it is done. " + " ".join(f"First, take part {i}." for i in range(number % 7))


@modelapi("scripted")
def scripted() -> type[ModelAPI]:
    """The provider."""

    class Scripted(ModelAPI):
        def __init__(
            self,
            model_name: str,
            base_url: str | None = None,
            api_key: str | None = None,
            config: GenerateConfig | None = None,
            **_: Any,
        ) -> None:
            super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())

        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> ModelOutput:
            prompt = input[-1].text
            with Path(os.environ["SCRIPTED_CALLS"]).open("a", encoding="utf-8") as file:
                file.write(json.dumps([self.model_name, prompt]) + "\n")
            await asyncio.sleep(float(os.environ.get("SCRIPTED_SLEEP", "0")))
            fault = os.environ.get("SCRIPTED_FAIL")
            if fault and fault in prompt:
                raise RuntimeError(f"no answer to {prompt[:20]}")
            return output_of(self.model_name, scripted_answer(self.model_name, prompt))

        def should_retry(self, ex: BaseException) -> bool:
            return False

    return Scripted


def output_of(name: str, text: str) -> ModelOutput:
    """An answer with one reasoning step before it."""
    message = ChatMessageAssistant(
        content=[ContentReasoning(reasoning="a thought of its own"), ContentText(text=text)], source="generate"
    )
    cut = number_of(name, text) % 5 == 0
    choice = ChatCompletionChoice(message=message, stop_reason="max_tokens" if cut else "stop")
    words = len(text.split())
    return ModelOutput(
        model=name,
        choices=[choice],
        usage=ModelUsage(input_tokens=9, output_tokens=words + 4, total_tokens=words + 13, reasoning_tokens=4),
    )


@contextmanager
def server(reply: Callable[[int, dict[str, Any], str], tuple[int, str]]) -> Iterator[tuple[str, list[str]]]:
    """A server with an OpenAI-compatible API.

    Args:
        reply: Takes the number of the call, its body and its authorization; gives status and text. Status 0: the server
            goes down.

    Yields:
        Its address, and the prompts that it got so far.
    """
    seen: list[str] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.reply(200, {"data": []})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                seen.append(body["messages"][-1]["content"])
                status, text = reply(len(seen), body, self.headers.get("authorization", ""))
            if status == 0:
                threading.Thread(target=self.server.shutdown).start()
                self.server.socket.close()
                self.connection.close()
                return
            if status != 200:
                self.reply(status, {"error": {"message": text}})
                return
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
            head = {"id": "x", "object": "chat.completion", "created": 1, "model": f"{body['model']}-revision-7"}
            self.reply(200, {**head, "choices": [choice], "usage": usage})

        def reply(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", seen
    finally:
        running.shutdown()
        running.server_close()
