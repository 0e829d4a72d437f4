"""The quick start's own commands: model, `axolotl train`, report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors import safe_open

from axolotl_mote.cli.quickstart import main
from axolotl_mote.cli.quickstart_report import evaluations, read_history

pytestmark = [pytest.mark.e2e, pytest.mark.smoke]


@pytest.fixture(scope="module")
def trained(axolotl: Callable[..., Any], smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of two steps of the quick start."""
    folder = tmp_path_factory.mktemp("quickstart")
    axolotl(
        "train",
        "example_configs/quickstart.yml",
        *("--output-dir", folder / "out"),
        *("--dataset-prepared-path", folder / "prepared"),
        *("--max-steps", "2"),
        *("--learning-rate", "0.002"),
        *("--warmup-steps", "0"),
    )
    return folder / "out"


def test_model_folder_is_whole(smollm2_dir: Path) -> None:
    tokenizer = json.loads((smollm2_dir / "tokenizer_config.json").read_text())
    config = json.loads((smollm2_dir / "config.json").read_text())
    assert tokenizer["eos_token"] == tokenizer["pad_token"] == "<|im_end|>"
    assert config["eos_token_id"] == 2
    assert config["dtype"] == "float32"
    assert (smollm2_dir / "chat_template.jinja").is_file()


def test_adapter_holds_experts_and_marker_rows_only(trained: Path) -> None:
    with safe_open(trained / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    rest = {name: shape for name, shape in shapes.items() if not name.endswith(("lora_A.weight", "lora_B.weight"))}
    assert len(shapes) - len(rest) == 30 * 7 * 2  # layers x linear layers x (A, B)
    assert list(rest.values()) == [(6, 576)]  # the head is tied: one set of marker rows
    assert all(64 in shape for name, shape in shapes.items() if name not in rest)


@pytest.fixture(scope="module")
def report(trained: Path) -> str:
    result = CliRunner().invoke(main, ["report", str(trained)], env={"COLUMNS": "60"})  # one panel below the other
    assert result.exit_code == 0, result.output
    return result.output


def test_report_shows_the_losses_and_the_next_command(report: str, trained: Path) -> None:
    for word in ("analysis", "guidance", "response", "before", "after", str(trained), "axolotl mote chat"):
        assert word in report


def test_report_answers_at_every_length(report: str) -> None:
    """The base model, each fixed chain, and the adaptive one, which says what it chose."""
    modes = ("base model", "response", "analysis+response", "analysis+guidance+response", "adaptive")
    assert all(re.search(rf"─ {re.escape(mode)} ─", report) for mode in modes)
    panel = report.partition("─ adaptive ─")[2].partition("╰")[0]
    lines = [line.strip("│ ") for line in panel.splitlines()]
    reasoning = "+".join(line for line in lines if line in ("analysis", "guidance"))
    assert (f"chose {reasoning} before answering" if reasoning else "chose no reasoning step") in " ".join(lines)


def test_page_shows_curves_answers_and_routed_tokens(report: str, trained: Path) -> None:
    page = (trained / "quickstart.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "analysis+guidance+response" in page
    spans = dict(re.findall(r'<span title="(\w+)" style="background: (#\w+)">', page))
    assert set(spans) == {"question", "analysis", "guidance", "response"}
    assert len(set(spans.values())) == 4
    assert "&lt;|analysis|&gt;" in page


def test_training_lowers_the_held_out_loss(trained: Path) -> None:
    found = evaluations(read_history(trained))
    assert found[0]["step"] == 0
    assert found[-1]["eval_loss"] < found[0]["eval_loss"]


def test_report_without_a_run_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "must hold a checkpoint; none was found. Train first: make quickstart" in result.output
