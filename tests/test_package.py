"""The wheel, built from the sdist, holds everything that a run needs; `make package` installs it for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import axolotl_mote


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
