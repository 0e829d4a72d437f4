"""The wheel, built from the sdist, holds everything that a run needs, and names the versions that were tested.

`make package` installs it for real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import types
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import axolotl_mote
from axolotl_mote.versions import TESTED, private_names


@pytest.fixture(scope="module")
def wheel(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skipped = shutil.ignore_patterns(".venv*", ".git", "models", "outputs", "*.egg-info", "build", "dist", "__py*")
    shutil.copytree(repo, source, ignore=skipped)
    build = [sys.executable, "-m", "build", "--no-isolation", "-q", "--outdir", folder / "dist", source]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((folder / "dist").glob("*.tar.gz"))) == 1
    return next((folder / "dist").glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_package(wheel: Path, repo: Path) -> None:
    package = repo / "axolotl_mote"
    wanted = {
        file.relative_to(repo).as_posix()
        for file in package.rglob("*")
        if file.is_file() and file.suffix != ".pyc" and "__pycache__" not in file.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_the_commands_run_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    where = "import axolotl_mote; print(axolotl_mote.__file__, axolotl_mote.__version__)"
    commands = ([sys.executable, "-c", where], [sys.executable, "-m", "axolotl_mote.cli", "--help"])
    shown = [
        subprocess.run(c, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
        for c in commands
    ]
    assert shown[0].split() == [str(tmp_path / "site" / "axolotl_mote" / "__init__.py"), axolotl_mote.__version__]
    assert "python -m axolotl_mote.cli build build.yml" in shown[1]
    entry_points = next((tmp_path / "site").glob("*.dist-info/entry_points.txt")).read_text()
    assert "axolotl-mote = axolotl_mote.cli:main" in entry_points
    assert "[axolotl.cli_commands]\nmote = axolotl_mote.cli:main" in entry_points


# --- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", TESTED)
def test_pip_is_told_the_versions_that_were_tested(package: str, repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["train"] + extras["eval"] + extras["serve"]
    wanted = [one for one in map(Requirement, lines) if one.name.replace("-", "_") == package]
    here = [one.specifier for one in wanted if not one.marker or one.marker.evaluate()]
    assert here == [SpecifierSet(TESTED[package])]


@pytest.mark.smoke
@pytest.mark.parametrize("package", ["torch", "transformers", "peft"])
def test_what_is_installed_is_what_was_tested(package: str) -> None:
    assert version(package) in SpecifierSet(TESTED[package])


def import_name() -> None:
    from transformers.masking_utils import gone  # noqa: F401


def import_module() -> None:
    import transformers.gone.one  # noqa: F401


def look_into_a_class() -> None:
    from transformers import PreTrainedModel

    PreTrainedModel._gone  # noqa: B018


def look_into_a_module() -> None:
    import transformers

    transformers.masking_utils._gone  # noqa: B018


@pytest.mark.parametrize("look", [import_name, import_module, look_into_a_class, look_into_a_module])
def test_a_name_that_is_gone_is_an_error_with_the_versions(look: Callable[[], None]) -> None:
    with pytest.raises(ImportError) as refused, private_names():
        look()
    message, tested = str(refused.value), TESTED["transformers"]
    assert message.startswith(f"transformers must be {tested}, the versions that axolotl_mote was tested with; got")
    assert f"got {version('transformers')}: " in message
    assert "gone" in message
    assert message.endswith(f"Run: pip install 'transformers{tested}'")
    assert "\n" not in message


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError, match="no attribute 'gone'"), private_names():
        types.SimpleNamespace().gone  # noqa: B018
    monkeypatch.setitem(sys.modules, "peft", None)  # not installed
    with pytest.raises(ModuleNotFoundError, match=r"^import of peft halted"), private_names():
        import peft  # noqa: F401


def test_the_model_cannot_be_imported_without_a_name_that_it_needs() -> None:
    """In a process of its own: a private method that PEFT no longer calls would leave the model without experts."""
    code = "from peft.tuners.lora import LoraModel; del LoraModel._create_new_module; import axolotl_mote"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: peft must be {TESTED['peft']}, the versions that"), done.stderr[-2000:]
    assert "'LoraModel' has no attribute '_create_new_module'" in last
