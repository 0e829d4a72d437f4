"""Set vLLM up for a CPU before anything imports it: Triton's interpreter, a platform, no calls home."""

from __future__ import annotations

import importlib.util
import os
import types

HAS_VLLM = importlib.util.find_spec("vllm") is not None

collect_ignore = (
    []
    if HAS_VLLM
    else [
        "test_kernel.py",
        "test_compat.py",
        "test_logits.py",
        "test_engine.py",
        "test_server.py",
        "test_server_faults.py",
        "test_clients.py",
    ]
)


def prepare() -> None:
    """Set the environment; for the V2 runner, the GPU's default, let Triton's kernels run interpreted."""
    os.environ |= {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":  # V1 compiles a few functions, for which Triton must be off
        os.environ.pop("TRITON_INTERPRET", None)
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)


if HAS_VLLM:
    prepare()
