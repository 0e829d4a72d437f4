"""A scripted OpenAI-compatible server and small question files, for the tests of the builder."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


def chat_reply(text: str | None, finish: str = "stop", **extra: Any) -> Reply:
    """A well-formed answer of /v1/chat/completions."""
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        **extra,
    }
    return 200, {}, json.dumps(body).encode()


def error_reply(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "type": "x", "code": code}}).encode()
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, body


def stage_of(body: dict[str, Any]) -> str:
    """Which stage a request belongs to, by our templates."""
    text = body["messages"][-1]["content"]
    openings = {
        "You are a safety reviewer": "check",
        "Do not answer it. Analyse": "analysis",
        "Do not answer it. Say": "guidance",
    }
    return next((stage for words, stage in openings.items() if words in text[:200]), "response")


class ScriptedServer:
    """Answers each request with what ``script(body, number)`` returns; number counts requests from 0."""

    def __init__(self, script: Callable[[dict[str, Any], int], Reply], port: int = 0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self.dead = False
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else a reply in two segments waits 40 ms for an acknowledgment

            def do_POST(self) -> None:
                if server.dead:  # connections that were kept open die as well
                    self.close_connection = True
                    return
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.times.append(time.monotonic())
                    server.in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server.in_flight)
                try:
                    status, headers, data = script(body, number)
                    if status == -1:  # a reply that never ends, one space at a time
                        self.wfile.write(
                            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
                        )
                        for _ in range(60):
                            self.wfile.write(b" ")
                            time.sleep(0.1)
                        return
                    self.send_response(status)
                    for name, value in {"content-type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with lock:
                        server.in_flight -= 1

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.dead = True
        self._http.shutdown()
        self._http.server_close()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


TOPICS = "bread rivers violins tax chess bees glass maps soap wool iron tea clocks salt ferries owls".split()  # noqa: SIM905


def prompts(count: int) -> list[dict[str, Any]]:
    """Questions that differ enough not to be near-duplicates."""
    return [{"prompt": f"{TOPICS[i % 16]} {i * 7919 % 10007}: {TOPICS[i // 16 % 16]}?"} for i in range(count)]
