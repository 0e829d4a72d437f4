"""Imports point downwards only, and light things stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "axolotl_mote"

LAYERS = [
    "noise",
    "digest",
    "steps",
    "args",
    "config",
    "routing",
    "masks",
    "attention",
    "loss",
    "markers",
    "adapter",
    "chain",
    "trainer",
    "host",
    "plugin",
    "generation",
    "export",
    "builder",
    "evaluation",
    "serving",
    "quickstart",
    "cli",
]
"""Bottom to top; a module may import those before it, never those after it."""

TRAINING_ONLY = {"chain", "trainer", "host", "plugin"}
"""Modules that may need axolotl. A serving environment has the package without it, so the rest must not."""

HOST_PACKAGES = {"axolotl", "deepspeed", "trl"}


def _layer(dotted: str) -> str:
    """``axolotl_mote.builder.prompts`` -> ``builder``; the package itself -> ``__init__``."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _modules() -> list[tuple[str, Path]]:
    """(dotted name, file) of every module; a package is named without ``__init__``."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), file))
    return found


def _imports(dotted: str, file: Path) -> list[tuple[str, int, bool]]:
    """(imported dotted name, line, whether at module level) of every import statement in a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = dotted if file.name == "__init__.py" else dotted.rpartition(".")[0]
    top_level = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        at_top = id(node) in top_level
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, at_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            if base == PACKAGE.name:  # from axolotl_mote import steps
                found += [(f"{base}.{alias.name}", node.lineno, at_top) for alias in node.names]
            else:
                found.append((base, node.lineno, at_top))
    return found


def violations(modules: list[tuple[str, Path]]) -> list[str]:
    """One line for every import that breaks a rule."""
    broken = []
    for dotted, file in modules:
        layer = _layer(dotted)
        if layer not in (*LAYERS, "__init__"):
            broken.append(f"{dotted} is in no layer; add it to LAYERS in {Path(__file__).name}")
            continue
        for target, line, at_top in _imports(dotted, file):
            where = f"{file.name}:{line} ({dotted})"
            root = target.split(".")[0]
            if root in HOST_PACKAGES and at_top and layer not in TRAINING_ONLY:
                broken.append(f"{where} imports {root} at the top; only {sorted(TRAINING_ONLY)} may")
            if root != PACKAGE.name or target == f"{PACKAGE.name}.__version__":
                continue
            other = _layer(target)
            if other not in LAYERS:
                broken.append(f"{where} imports {target}; import the module that defines it")
            elif layer == "__init__" or LAYERS.index(other) > LAYERS.index(layer):
                broken.append(f"{where} imports {target}, which is above it")
            elif layer not in (*TRAINING_ONLY, "quickstart", "cli") and other in ("trainer", "plugin"):
                broken.append(f"{where} imports {target}, which needs axolotl")
    return broken


def test_imports_point_downwards() -> None:
    assert violations(_modules()) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("axolotl_mote.routing", "from axolotl_mote.adapter import MoteModel", "which is above it"),
        ("axolotl_mote.routing", "def f():\n    from axolotl_mote import plugin", "which is above it"),
        ("axolotl_mote.routing", "from . import adapter", "which is above it"),
        ("axolotl_mote.generation.api", "from ..plugin import MotePlugin", "which needs axolotl"),
        ("axolotl_mote.generation.api", "from axolotl_mote import load_mote", "import the module that defines it"),
        ("axolotl_mote.masks", "import axolotl.utils", "imports axolotl at the top"),
        ("axolotl_mote.newcomer", "import os", "is in no layer"),
    ],
)
def test_the_rule_can_fail(tmp_path: Path, module: str, source: str, message: str) -> None:
    file = tmp_path / "module.py"
    file.write_text(source)
    found = violations([(module, file)])
    assert len(found) == 1
    assert message in found[0]


def test_downward_imports_pass(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import torch\nfrom axolotl_mote import steps\nfrom axolotl_mote.config import MoteConfig\n")
    assert violations([("axolotl_mote.routing", file)]) == []


@pytest.mark.parametrize(
    "code",
    [
        "import axolotl_mote",
        "from axolotl_mote.cli import main",
        "from axolotl_mote.cli import main as m; [m.get_command(None, name) for name in m.list_commands(None)]",
        "import axolotl_mote.quickstart",
    ],
)
def test_imports_stay_light(code: str) -> None:
    heavy = "{'torch', 'transformers', 'peft', 'axolotl', 'datasets'}"
    probe = f"import sys; {code}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
