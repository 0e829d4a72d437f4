"""The doctor on the quick start: the real model, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

from .commands import BIN, Command


def test_the_quick_start_passes(smollm2_dir: Path, tmp_path: Path, repo: Path) -> None:
    """Several processes and resuming are tested on the tiny model (tests/doctor)."""
    args = [BIN / "axolotl-mote", "doctor", "example_configs/quickstart.yml", "--json", "--no-processes"]
    args += ["--skip", "resume", "--steps", "3"]
    log = Command(args, tmp_path / "doctor.log", repo).wait(1800).ok().log
    found = json.loads(log[log.rindex('{"config"') :].splitlines()[0])  # behind what the status line wrote
    verdicts = {line["line"]: line["verdict"] for line in found["lines"]}
    not_here = {"packing": "not applicable", "compile": "not applicable", "sharding": "not applicable"}
    assert verdicts == dict.fromkeys(verdicts, "ok") | not_here | {"processes": "not tested"}
