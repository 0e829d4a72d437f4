"""Executes docs/tutorial.ipynb in place, and keeps its outputs without anything that names this machine.

Run by `make tutorial`, from the root of the repository; needs the extra `docs`. It reuses outputs/quickstart.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
PLACES = re.compile("|".join(re.escape(str(place)) + r"/?" for place in (ROOT, Path.home())))


def cleaned(cell: Any) -> Any:
    """A cell without times, warnings of libraries, and paths of this machine."""
    cell.metadata = nbformat.NotebookNode()
    if cell.cell_type == "code":
        kept = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.outputs = nbformat.from_dict(json.loads(PLACES.sub("", json.dumps(kept))))
        for output in cell.outputs:
            output.pop("metadata", None) if output.output_type == "stream" else output.update(metadata={})
    return cell


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(ROOT)}}).execute()
    notebook.cells = [cleaned(cell) for cell in notebook.cells]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.validate(notebook)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
