"""Training and evaluation on a device that is not the CPU: no tensor is left behind, nothing waits for the device.

The device has no hardware and no values; emulated.py says how, and runs as a process of its own. The first step may
copy tables to the device (gates, marker ids), later steps copy nothing in either direction. Covered are the model's
forward and backward pass, the losses and the sums by step, with the mask of step dropout and without any.

Not covered: mote_varlen and flash attention, whose segments copy the tokens' steps to the CPU once per forward by
design (``build_segments``); the kernels themselves, ``torch.compile`` and what only CUDA does, which test_gpu.py has;
and the looks that transformers takes into its own masks without step dropout (it spares fake tensors, except in its
mask for flex_attention with padding).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import CASES, FAULTS


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """By case and by fault: the error, or nothing."""
    script = Path(__file__).parent / "emulated.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_step_stays_on_the_device(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(outcomes: dict[str, str], fault: str) -> None:
    """One that would need the CPU in the forward or backward pass, planted into a model without any."""
    assert outcomes[fault].startswith(FAULTS[fault][1] + ":")
