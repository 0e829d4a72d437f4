"""Manifest and rows to summary.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from axolotl_mote.evaluation.figures.measures import Row
from axolotl_mote.evaluation.figures.summary import Summary, summarize
from axolotl_mote.evaluation.page.sections import make_page
from axolotl_mote.files import read_all_rows, write_atomically


def write_report(output: Path, manifest: Mapping[str, Any], rows: Iterable[Row]) -> Summary:
    """Write summary.json and report.html.

    Args:
        output: Folder.
        manifest: As in manifest.json.
        rows: Of results.jsonl; read more than once.
    """
    kept = list(rows)
    details = {key: manifest[key] for key in ("grader", "seed", "versions") if key in manifest}
    faults = manifest.get("faults", ())
    summary = summarize(manifest["cells"], kept, seed=manifest["seed"], details=details, faults=faults)
    write_atomically(output / "summary.json", json.dumps(summary.as_dict(), indent=1, ensure_ascii=False) + "\n")
    make_page(summary, manifest, kept).write(output / "report.html")
    return summary


def read_report(output: Path) -> Summary:
    """Write summary.json and report.html anew from manifest.json and results.jsonl.

    Raises:
        ValueError: If the folder holds no results, or broken ones.
    """
    path = output / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        cells = manifest["cells"]
        rows = list(read_all_rows(output / "results.jsonl"))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"output must hold manifest.json and results.jsonl; got {error!r} at {output}. Run the evaluation first."
        ) from error
    known = {(cell["system"], cell["steps"], cell["task"]) for cell in cells}
    return write_report(output, manifest, [r for r in rows if (r["system"], r["steps"], r["task"]) in known])
