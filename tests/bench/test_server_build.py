"""The builder against a real OpenAI-compatible server process that dies in the middle; server_build.py measures it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from server_build import Server, run_with_kill


@pytest.mark.e2e
def test_a_real_server_that_is_killed_and_restarted_loses_nothing(
    smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = Path(sys.executable).with_name("transformers")
    command = f"{transformers} serve {smollm2_dir} --continuous-batching --device cpu --host 127.0.0.1 --port {{port}}"
    server = Server(command)
    try:
        server.wait()
        result = run_with_kill(tmp_path, "killed", server, str(smollm2_dir), 6, 4, 96, 4)
    finally:
        server.kill()
    counts = json.loads((tmp_path / "killed" / "manifest.json").read_text())["counts"]
    assert result["calls"] == 6 + sum(counts["verdicts"].values())  # six answers, and a check of each without a defect
    assert sum(counts["verdicts"].values()) + sum(counts["defects"].values()) == 6
    killed = re.search(r"server killed with (\d+) calls recorded", capsys.readouterr().out)
    assert killed is not None
    assert 0 < int(killed[1]) < result["calls"]
