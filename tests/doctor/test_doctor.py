"""The unbroken product: every line that applies holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from axolotl_mote.doctor.lines import FAILED, LINES, NOT_APPLICABLE, NOT_TESTED, OK
from axolotl_mote.doctor.run import CHECKS, run_lines
from axolotl_mote.doctor.session import Session


def test_every_line_has_a_check() -> None:
    assert CHECKS.keys() == LINES.keys()


def test_everything_holds(open_session: Callable[..., Session]) -> None:
    session = open_session(sample_packing=True)
    found = {finding.line: finding for finding in run_lines(session, list(LINES))}
    for finding in found.values():
        print(f"{finding.line:14} {finding.verdict:14} {finding.seconds:5.1f} {finding.text}")
    others: dict[str, Any] = {"compile": NOT_APPLICABLE, "processes": NOT_TESTED, "sharding": NOT_APPLICABLE}
    assert {name: finding.verdict for name, finding in found.items()} == dict.fromkeys(LINES, OK) | others


@pytest.mark.parametrize("changes", [{"bf16": True}, {"load_in_4bit": True}])
def test_half_precision_and_quantized_bases(open_session: Callable[..., Session], changes: dict[str, Any]) -> None:
    lines = [
        name for name in LINES if name not in ("training", "resume", "processes", "sharding", "estimate", "compile")
    ]
    found = list(run_lines(open_session(sample_packing=True, **changes), lines))
    for finding in found:
        print(f"{finding.line:14} {finding.verdict:14} {finding.seconds:5.1f} {finding.text}")
    assert {finding.line: finding.verdict for finding in found} == dict.fromkeys(lines, OK)


@pytest.mark.parametrize(
    ("family", "changes", "verdict", "key", "said"),
    [
        ("llama", {}, OK, None, "llama, tiny and random with transformers"),
        ("bamba", {}, FAILED, "mote.step_dropout", "step dropout refused"),
        ("bamba", {"mote": {"step_dropout": 0.0}}, OK, None, "packing base"),
        ("biogpt", {"sample_packing": True}, NOT_TESTED, None, "the lines below decide about packing"),
        ("mine", {}, NOT_TESTED, None, "mine is not in the support matrix, which is of transformers"),
    ],
)
def test_the_matrix_says_what_is_known_of_a_family(
    open_session: Callable[..., Session], family: str, changes: dict[str, Any], verdict: str, key: str, said: str
) -> None:
    session = open_session(**changes)
    session.cfg.model_config_type = family
    (found,) = run_lines(session, ["family"])
    assert (found.verdict, found.key) == (verdict, key), found.text
    assert said in found.text


def test_a_fault_of_the_configuration_is_found_by_its_line(open_session: Callable[..., Session]) -> None:
    found = list(run_lines(open_session(lora_mlp_kernel=True), ["versions", "config", "family"]))
    assert [finding.verdict for finding in found] == [OK, FAILED, NOT_TESTED]
    assert found[1].key == "lora_mlp_kernel"
    assert [name for name in LINES if name in ("config", "family")] == ["config", "family"]
