"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from rich.console import Console

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPO = Path(__file__).resolve().parent.parent


class PlainEnvironment(Mapping[str, str]):
    """The environment as rich shall see it in the tests: without colors, whatever the machine asks for.

    rich keeps the environment that it saw first, and ``datasets.map`` with several processes puts a copy in its place,
    which later changes do not reach. This one looks anew each time.
    """

    colors = frozenset({"FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"})

    def __getitem__(self, name: str) -> str:
        if name in self.colors:
            raise KeyError(name)
        return os.environ[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in os.environ if name not in self.colors)

    def __len__(self) -> int:
        return sum(1 for _ in self)


Console._environ = PlainEnvironment()
os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="module", autouse=True)
def _axolotl_as_imported() -> None:
    """What axolotl keeps for the life of a process, each module of tests finds as a new process would.

    The plugins of every configuration that was read (one of a baseline adds an adapter), and the distributed state,
    which axolotl refuses to set up again.
    """
    if base := sys.modules.get("axolotl.integrations.base"):
        base.PluginManager.get_instance().plugins.clear()
    if distributed := sys.modules.get("axolotl.utils.distributed"):
        distributed.distributed_state = None


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Folder of the real SmolLM2-135M-Instruct (float32); built once into models/, reused by later runs."""
    from axolotl_mote.cli.quickstart import prepare_model

    folder = REPO / "models" / "SmolLM2-135M-Instruct"
    prepare_model(folder)
    return folder


@pytest.fixture(scope="session")
def seed_chains() -> Path:
    """26 hand-written chains, the training part."""
    return REPO / "example_configs" / "data" / "seed_chains.jsonl"


@pytest.fixture(scope="session")
def heldout_chains() -> Path:
    """6 hand-written chains that no config trains on."""
    return REPO / "example_configs" / "data" / "seed_chains_heldout.jsonl"


@pytest.fixture(scope="session")
def axolotl() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command line from the repository root: ``axolotl("train", config, timeout=300, env={...})``.

    Standard error is folded into standard output; a failing command fails the test unless ``check=False``.
    """
    scripts = Path(sys.executable).parent

    def run(
        *args: str | Path, timeout: float = 600, check: bool = True, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(scripts / "axolotl"), *map(str, args)],
            cwd=REPO,
            env={**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0 or not check, f"axolotl {args[0]} failed:\n{done.stdout[-6000:]}"
        return done

    return run
