"""Imports point downwards only, between the rooms and inside each of them; light things stay light.

The order is the one that people read: the docstring of a package lists its modules from the bottom up, and a module
imports only those listed before it. Private names of other libraries are used in the compat modules only.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "axolotl_mote"

NEEDS_AXOLOTL = {"training", "doctor"}
"""The rooms that may import axolotl. A serving environment has the package without it."""

HOSTS = {"axolotl", "accelerate", "deepspeed", "trl"}

NAMED_EXCEPTIONS = {("axolotl_mote.chain", "axolotl_mote.training.dataset")}
"""axolotl looks for `load` in the module that `type: axolotl_mote.chain` names; the strategy belongs to training."""

FOREIGN = {"torch", "transformers", "peft", "inspect_ai", "vllm"} | HOSTS
"""Libraries whose private names may be used in the compat modules alone."""

COMPAT = {"model.compat", "training.compat", "evaluation.compat", "serving.compat"}

HEAVY = {"torch", "transformers", "peft", "datasets", "vllm"} | HOSTS


def listed(init: Path) -> list[str]:
    """Names that the docstring of a package lists, from the bottom up."""
    docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")), clean=False) or ""
    return re.findall(r"^    (\w+)  +\S", docstring, re.MULTILINE)


def modules(root: Path) -> list[tuple[str, Path]]:
    """(dotted name, file) of every module; a package is named without ``__init__``."""
    found = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root.parent).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), file))
    return found


def imports(dotted: str, file: Path) -> list[tuple[str, int]]:
    """(imported dotted name, line) of every import in a file, at any depth."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = dotted if file.name == "__init__.py" else dotted.rpartition(".")[0]
    if dotted == PACKAGE.name:  # what the package exports, for type checkers
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return found


def is_private(name: str) -> bool:
    """Whether a name starts with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def own_names(root: Path) -> set[str]:
    """Private names that the package itself defines: functions, methods, classes, variables and fields."""
    found = set()
    for _, file in modules(root):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
                found.add(node.attr)
    return {name for name in found if is_private(name)}


def private_names(file: Path, own: set[str]) -> Iterator[tuple[str, int]]:
    """(private name of another library, line) of every use in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            if is_private(node.attr) and node.attr not in own:
                yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own:
                yield str(name.value), node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                name = f"{base}{alias.name}"
                if name.split(".")[0] in FOREIGN and any(map(is_private, name.split("."))):
                    yield name, node.lineno


def violations(root: Path) -> list[str]:
    """One line for every import that breaks a rule, and for every list that is not true."""
    known = dict(modules(root))
    broken = []
    for dotted, file in known.items():
        if file.name == "__init__.py":
            present = {name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == dotted}
            names = listed(file)
            if set(names) != present - {"__main__"} or len(set(names)) != len(names):
                broken.append(f"{dotted} must list {sorted(present)} in its docstring, once each; got {names}")
    for dotted, file in known.items():
        for target, line in imports(dotted, file):
            where = f"{dotted}:{line}"
            if target.split(".")[0] in HOSTS and not NEEDS_AXOLOTL & {*dotted.split(".")[1:2]}:
                broken.append(f"{where} imports {target}; only {sorted(NEEDS_AXOLOTL)} may")
            if target.split(".")[0] != root.name or target == f"{root.name}.__version__":
                continue
            while target not in known:
                target = target.rpartition(".")[0]
            if (dotted, target) not in NAMED_EXCEPTIONS and not _downward(root, known, dotted, target):
                broken.append(f"{where} imports {target}, which does not stand below it")
    own = own_names(root)
    for dotted, file in known.items():
        if dotted.partition(".")[2] not in COMPAT:
            broken += [
                f"{dotted}:{line} uses the private name {name}; only {sorted(COMPAT)} may"
                for name, line in private_names(file, own)
            ]
    return list(dict.fromkeys(broken))


def _downward(root: Path, known: dict[str, Path], dotted: str, target: str) -> bool:
    """Whether a target stands before a module in the list of the package that both live in."""
    here, there = dotted.split("."), target.split(".")
    depth = 0
    while depth < min(len(here), len(there)) and here[depth] == there[depth]:
        depth += 1
    if here[-1] == "__main__" and there == here[:-1]:
        return True
    if depth == len(there) or depth == len(here):  # a package and what is inside it
        return depth == len(here) and depth > 1 and known[dotted].name == "__init__.py"
    package = known[".".join(here[:depth])]
    order = [*listed(package), "__main__"]
    return here[depth] in order and there[depth] in order and order.index(there[depth]) < order.index(here[depth])


def test_imports_point_downwards() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("low.one", "from pack.high import api", "pack.high.api, which does not stand below it"),
        ("low.one", "def f():\n    from pack import high", "pack.high, which does not stand below it"),
        ("low.one", "from .two import x", "pack.low.two, which does not stand below it"),
        ("low.two", "from . import one", None),
        ("high.api", "from ..low.two import x", None),
        ("high.api", "from pack import load", "pack, which does not stand below it"),
        ("high.api", "import axolotl.utils", "imports axolotl.utils; only"),
        ("high.api", "def f():\n    import deepspeed", "imports deepspeed; only"),
        ("high.api", "from transformers.utils import _x", "uses the private name transformers.utils._x"),
        ("high.api", "from inspect_ai._eval.eval import x", "uses the private name inspect_ai._eval.eval.x"),
        ("high.api", "import torch._dynamo", "uses the private name torch._dynamo"),
        ("high.api", "def f(model):\n    return model.config._x", "uses the private name _x"),
        ("high.api", "def f(model):\n    model._x = 1", "uses the private name _x"),
        ("high.api", "def f(model):\n    return getattr(model, '_x', None)", "uses the private name _x"),
        ("high.api", "class A:\n    def f(self, other):\n        self._x = other._x", None),
        ("high.api", "class A(B):\n    def _f(self):\n        super()._f()", None),
        ("model.compat", "from transformers.utils import _x\n\ndef f(model):\n    return model._y", None),
        ("low.three", "", "must list ['one', 'three', 'two'] in its docstring"),
    ],
)
def test_the_rule_can_fail(tmp_path: Path, module: str, source: str, message: str | None) -> None:
    files = {
        "__init__": '"""P.\n\n    low    x\n    model  x\n    high   x\n"""',
        "model/__init__": '"""M.\n\n    compat  x\n"""',
        "model/compat": "",
        "low/__init__": '"""L.\n\n    one  x\n    two  x\n"""',
        "low/one": "",
        "low/two": "from pack.low import one",
        "high/__init__": '"""H.\n\n    api  x\n"""',
        "high/api": "from pack.low.one import x",
    }
    for name, text in {**files, module.replace(".", "/"): source}.items():
        file = tmp_path / "pack" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    found = violations(tmp_path / "pack")
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


@pytest.mark.parametrize(
    "code",
    [
        "import axolotl_mote",
        "import axolotl_mote.chain.codec, axolotl_mote.chain.rows, axolotl_mote.report",
        "import click; from axolotl_mote.cli import main as m; c = click.Context(m, info_name='mote')\n"
        "[m.get_command(c, name) for name in m.list_commands(c)]",
        "import axolotl_mote.cli.quickstart",
    ],
)
def test_imports_stay_light(code: str) -> None:
    probe = f"import sys\n{code}\nprint(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
