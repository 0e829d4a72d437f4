"""Fixtures of the builder's tests: scripted servers, settings of a small build."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builder_kit import Reply, ScriptedServer, prompts, write_rows

from axolotl_mote.builder.settings import Settings


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    """Starts scripted servers and stops them after the test."""
    running: list[ScriptedServer] = []

    def start(script: Callable[[dict[str, Any], int], Reply]) -> ScriptedServer:
        running.append(ScriptedServer(script))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def real_page() -> None:
    """For tests whose builds must write the real statistics page."""


@pytest.fixture(autouse=True)
def _empty_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other builds write an empty one: drawing it takes longer than a small build."""
    if "real_page" not in request.fixturenames:
        monkeypatch.setattr("axolotl_mote.builder.output.results.write_html", lambda path, *_, **__: path.touch())


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a build in ``tmp_path``: 4 questions, one server model with quick retries; keywords replace keys."""

    def make(
        url: str | list[str] = "http://127.0.0.1:9/v1",
        *,
        count: int = 4,
        server: dict[str, Any] | None = None,
        **keys: Any,
    ) -> Settings:
        questions = write_rows(tmp_path / f"questions_{count}.jsonl", prompts(count))
        urls = [url] if isinstance(url, str) else url
        model = {
            "type": "server",
            "model": "m",
            "base_urls": urls,
            "backoff": 0.01,
            "timeout": 5,
            "retry_for": 10,
            **(server or {}),
        }
        raw = {
            "output": tmp_path / "out",
            "questions": [{"path": str(questions)}],
            "models": {"default": model, **keys.pop("models", {})},
            **keys,
        }
        return Settings.model_validate(raw)

    return make
