"""The programs of docs/export.md, run as they stand there."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from kit import save_adapter, tiny_model, tiny_mote

from axolotl_mote.export import export_adapter
from axolotl_mote.generation import codec_for

QUESTION = [{"role": "user", "content": "How do I kill a Python process?"}]


@pytest.fixture
def exported(tmp_path, monkeypatch):
    model, tokenizer = tiny_mote()
    tiny_model().save_pretrained(tmp_path / "models")
    folder = save_adapter(model, tokenizer, tmp_path / "adapter", tmp_path / "models")
    export_adapter(folder, tmp_path / "exported", verify=False)
    monkeypatch.chdir(tmp_path)
    return model, tokenizer


def programs(repo) -> list[str]:
    return re.findall(r"(?ms)^```python\n(.*?)^```", (repo / "docs" / "export.md").read_text(encoding="utf-8"))


def test_switching_adapters_gives_the_tokens_of_the_step_routed_model(exported, repo):
    model, tokenizer = exported
    program = next(text for text in programs(repo) if "set_adapter" in text)
    names: dict = {}
    exec(program.replace("< 200", "< 12"), names)
    codec = codec_for(model, tokenizer)
    ids = codec.encode_question(QUESTION)
    for step, tokens in names["chain"].items():
        number = codec.vocabulary.step_id(step) - 1
        ids.append(codec.vocabulary.start_ids[number])
        expected = []
        while len(expected) < 12:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + expected])).logits[0, -1].argmax())
            if token == codec.vocabulary.end_ids[number]:
                break
            expected.append(token)
        assert tokens == expected, step
        ids += [*expected, codec.vocabulary.end_ids[number]]
    assert list(names["chain"]) == ["analysis", "response"]


def test_the_client_asks_for_one_step_after_another(exported, repo, capsys):
    """Each request holds everything before it, as ids, and names the adapter of its step."""
    codec = codec_for(*exported)
    bodies: list[dict] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            reply = json.dumps({"choices": [{"text": f"the {body['model']}<|guidance|>"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = HTTPServer(("localhost", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        program = next(text for text in programs(repo) if "urlopen" in text)
        exec(program.replace("localhost:8000", f"localhost:{server.server_port}"), {})
    finally:
        server.shutdown()
        server.server_close()
    starts, ends = codec.vocabulary.start_ids, codec.vocabulary.end_ids
    question, text = codec.encode_question(QUESTION), codec.encode_text("the analysis<|guidance|>")
    assert [body["model"] for body in bodies] == ["analysis", "response"]
    assert [body["prompt"] for body in bodies] == [
        [*question, starts[0]],
        [*question, starts[0], *text, ends[0], starts[2]],
    ]
    assert [body["stop_token_ids"] for body in bodies] == [[ends[0]], [ends[2]]]
    assert "response the response" in capsys.readouterr().out
