"""All oracles on all families: `python tests/families/matrix.py [FAMILY ...]`, and the page that shows the outcomes.

Every family runs in a process of its own, with a time limit, and leaves ``outputs/families/FAMILY.json``; ``--page``
writes docs/support-matrix.md from all of them, and what the doctor knows of it. The exit status is 1 if anything is
WRONG or RAW.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))

import oracles  # noqa: E402
from oracles import ROWS, Outcome, judge, plain  # noqa: E402
from tiny import FAMILIES, tiny_model  # noqa: E402

from axolotl_mote.model.selfcheck import check_generation  # noqa: E402

RESULTS = REPO / "outputs" / "families"
PAGE = REPO / "docs" / "support-matrix.md"
RECORD = REPO / "axolotl_mote" / "doctor" / "families.json"
SECONDS = 60  # of the processor, for one family
PATIENCE = 900  # seconds until a family that does nothing counts as hanging, on a busy machine too
PROCESSES = 2
FAULTS = ("WRONG", "RAW")
Cell = Callable[[], float]


def examine(family: str) -> dict[str, Outcome]:
    """The outcome of every oracle for one family."""
    words = plain(ROWS)
    try:
        base = tiny_model(family)
        oracles.logits(base, words[0])
    except Exception as error:  # noqa: BLE001  (whatever a family raises is its outcome)
        return {"build": Outcome("not built", oracles.raised(error).detail)}
    try:
        model = oracles.routed(family)
    except Exception as error:  # noqa: BLE001  (whatever a family raises is its outcome)
        return {"adapter": oracles.raised(error)}

    def in_batch(layout: str) -> Cell:
        return lambda: oracles.batched_equals_alone(base, words, layout)

    def dropping(layout: str) -> Cell:
        return lambda: oracles.masked_equals_shortened(oracles.routed(family, step_dropout=True), layout)

    def alone(oracle: Callable[[Any], float]) -> Cell:
        return lambda: oracle(oracles.routed(family, question_routing="shared"))

    def decoding(model: Any, rows: oracles.Rows, **options: Any) -> Cell:
        return lambda: oracles.cached_equals_full(model, rows, **options)

    def checked(cell: Cell) -> Cell:
        def run() -> float:
            check_generation(model)  # as load_mote does
            return cell()

        return run

    def in_folder(oracle: Callable[[Path], float]) -> Cell:
        def cell() -> float:
            with tempfile.TemporaryDirectory() as folder:
                return oracle(Path(folder))

        return cell

    def quantized(folder: Path) -> float:
        model = oracles.routed(family, base=oracles.quantized_base(base, folder))
        return oracles.loss_equals_cross_entropy(model)

    def quantized_base(folder: Path) -> float:
        return oracles.runs(oracles.quantized_base(base, folder), words)

    def loaded_and_continued(folder: Path) -> float:
        return max(oracles.base_loaded_is_saved(base, folder), oracles.continued_equals_full(base, words))

    def beams() -> float:
        # They decode few tokens, in which a cache that is off may stay below the tolerance.
        return max(oracles.beams_equal_full(base, words), oracles.cached_equals_full(base, words))

    static = {"cache_implementation": "static"}
    cells: dict[str, tuple[Cell, Cell | None]] = {
        "loss": (lambda: oracles.loss_equals_cross_entropy(model), lambda: oracles.runs(base, words)),
        "padding": (lambda: oracles.batched_equals_alone(model, ROWS, "right"), in_batch("right")),
        "packing": (lambda: oracles.batched_equals_alone(model, ROWS, "packed"), in_batch("packed")),
        "dropout padded": (dropping("right"), in_batch("right")),
        "dropout packed": (dropping("packed"), in_batch("packed")),
        "gradients": (alone(oracles.gradients_follow_steps), None),
        "own step": (
            alone(oracles.experts_keep_to_their_step),
            lambda: oracles.later_tokens_change_nothing(base),
        ),
        "disabled": (lambda: oracles.disabled_is_the_base(family), None),
        "save and load": (
            in_folder(lambda folder: oracles.loaded_is_saved(family, model, folder)),
            in_folder(lambda folder: oracles.base_loaded_is_saved(base, folder)),
        ),
        "cache": (checked(decoding(model, ROWS)), decoding(base, words)),
        "static cache": (decoding(model, ROWS, **static), decoding(base, words, **static)),
        "beams": (lambda: oracles.beams_equal_full(model, ROWS), beams),
        "continued cache": (
            lambda: oracles.continued_equals_full(model, ROWS),
            lambda: oracles.continued_equals_full(base, words),
        ),
        "quantized": (in_folder(quantized), in_folder(quantized_base)),
        "export": (
            in_folder(lambda folder: oracles.exported_is_routed(family, model, folder)),
            in_folder(loaded_and_continued),
        ),
    }
    return {name: judge(*cell) for name, cell in cells.items()}


# --- one process per family -----------------------------------------------------------------------------------------


def run(families: list[str]) -> None:
    """Examine families, a few at a time; one that crashes or takes too long is noted as such."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")  # the imports, most of the time, are shared
    waiting, running = list(families), {}
    while waiting or running:
        while waiting and len(running) < PROCESSES:
            family = waiting.pop(0)
            _file(family).unlink(missing_ok=True)
            process = fork.Process(target=_examine, args=(family,))
            process.start()
            running[family] = process, time.monotonic()
        for family, (process, started) in list(running.items()):
            process.join(0.02)
            late = time.monotonic() - started > PATIENCE
            if process.is_alive() and late:
                process.kill()
                process.join()
            if not process.is_alive():
                del running[family]
                if not _file(family).exists():
                    late = late or process.exitcode == -signal.SIGXCPU
                    fault = f"no result within {SECONDS} s" if late else f"exit code {process.exitcode}"
                    _write(family, {"process": Outcome("RAW", fault)}, 0.0)


def _examine(family: str) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    started = time.process_time()
    cells = examine(family)
    _write(family, cells, time.process_time() - started)


def _file(family: str) -> Path:
    return RESULTS / f"{family}.json"


def _write(family: str, cells: dict[str, Outcome], seconds: float) -> None:
    values = {name: asdict(outcome) for name, outcome in cells.items()}
    _file(family).write_text(json.dumps({"cells": values, "seconds": round(seconds, 2)}, indent=1) + "\n")


def read() -> dict[str, dict[str, Outcome]]:
    """The outcomes of all families that have been examined."""
    found = {family: json.loads(_file(family).read_text())["cells"] for family in FAMILIES if _file(family).exists()}
    return {family: {name: Outcome(**value) for name, value in cells.items()} for family, cells in found.items()}


# --- the page -------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[list[str], list[str]]] = {
    "training": (["loss", "padding", "gradients", "own step", "disabled", "save and load"], []),
    "step dropout": (["dropout padded"], ["dropout packed"]),
    "packing": (["packing"], []),
    "generation with a cache": (["cache", "beams"], ["static cache", "continued cache"]),
    "quantized base": (["quantized"], []),
    "export": (["export"], []),
}
"""Cells that make up a column, and those that count in it only when they are at fault."""

_INTRODUCTION = """# Support matrix

Generated by `make families` with transformers {transformers}, peft {peft} and torch {torch}; do not edit.

Every family of causal models that transformers knows, as a tiny random model in float32 on the CPU. Each cell is a
computation done in two ways, for example step dropout against chains that never held the dropped step, or decoding with
a cache, padded on the left, against one forward without; tests/families/oracles.py holds them all.

- **right**: equal up to {tolerance:.0e} of the largest logit.
- **refused**: an error names it before it costs anything; the note says the way out.
- **base**: the base model alone fails the same comparison, so the fault is not MoTE's.
- **wrong**, **error**: known faults. **not tested**: the note says why.

{counts}

"""


def page(results: dict[str, dict[str, Outcome]]) -> str:
    """The matrix as Markdown: families x columns, with notes."""
    notes: dict[str, int] = {}
    rows = ["| family | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    counts: Counter[str] = Counter()
    for family, cells in results.items():
        shown = {column: _column(cells, *names) for column, names in COLUMNS.items()}
        counts[min((outcome.kind for outcome in shown.values()), key=_ORDER.index)] += 1
        rows.append(f"| {family} | " + " | ".join(_shown(one, family, notes) for one in shown.values()) + " |")
    summary = ", ".join(f"{counts[kind]} {_WORDS[kind]}" for kind in _ORDER if counts[kind])
    introduction = _INTRODUCTION.format(
        **_versions(),
        tolerance=oracles.TOLERANCE,
        counts=f"{len(results)} families, each counted by its worst cell: {summary}.",
    )
    listed = [f"{number}. {note}" for note, number in notes.items()]
    return introduction + "\n".join([*rows, "", "## Notes", "", *listed]) + "\n"


def record(results: dict[str, dict[str, Outcome]]) -> str:
    """The same as JSON, without the notes: one family a line."""
    words = {kind: word.strip("*") for kind, word in _WORDS.items()}
    families = {
        family: [words[_column(cells, *names).kind] for names in COLUMNS.values()] for family, cells in results.items()
    }
    lines = ",\n".join(f"  {json.dumps(family)}: {json.dumps(found)}" for family, found in families.items())
    head = f' "versions": {json.dumps(_versions())},\n "columns": {json.dumps(list(COLUMNS))},\n'
    return f'{{\n{head} "families": {{\n{lines}\n }}\n}}\n'


def _versions() -> dict[str, str]:
    return {name: version(name).split("+")[0] for name in ("transformers", "peft", "torch")}


_ORDER = ("WRONG", "RAW", "not built", "refused", "base", "right")
_WORDS = {"WRONG": "**wrong**", "RAW": "**error**", "not built": "not tested"} | {
    kind: kind for kind in ("refused", "base", "right")
}


def _column(cells: dict[str, Outcome], names: list[str], faults_of: list[str]) -> Outcome:
    """The worst of a column's cells; a family that could not be examined has one cell alone."""
    found = [cells[name] for name in names if name in cells]
    found += [cells[name] for name in faults_of if name in cells and cells[name].kind in FAULTS]
    return min(found or cells.values(), key=lambda outcome: _ORDER.index(outcome.kind))


def _shown(outcome: Outcome, family: str, notes: dict[str, int]) -> str:
    """A cell of the table, with the number of its note."""
    if outcome.kind == "right":
        return "right"
    text = outcome.detail or f"off by {outcome.difference:.0e}"
    if outcome.kind == "base":
        text = "The base model alone is inexact here." if text.startswith("off by") else f"The base model alone: {text}"
    # One note for all families with the same cause.
    text = re.sub(r"\b\w+(For(CausalLM|ConditionalGeneration)|LMHead\w*|Model)\b", "this model", text)
    text = text.replace(f" in {family.removesuffix('_text')}", " in this model").replace("|", "\\|")
    return f"{_WORDS[outcome.kind]} [{notes.setdefault(text, len(notes) + 1)}]"


def main() -> int:
    """Examine families, print the faults, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=FAMILIES, metavar="FAMILY")
    parser.add_argument("--page", action="store_true", help="write the page and its record from all results so far")
    arguments = parser.parse_args()
    unknown = set(arguments.families) - set(FAMILIES)
    if unknown:
        parser.error(f"FAMILY must be one that transformers knows; got {', '.join(sorted(unknown))}.")
    run(arguments.families)
    results = read()
    chosen = [(family, *cell) for family in arguments.families for cell in results[family].items()]
    for family, name, outcome in chosen:
        if outcome.kind != "right":
            size = "" if outcome.difference is None else f" off by {outcome.difference:.1e}"
            print(f"{outcome.kind:9} {family}, {name}:{size} {outcome.detail}".rstrip())
    counts = Counter(outcome.kind for *_, outcome in chosen)
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    if arguments.page:
        PAGE.write_text(page(results), encoding="utf-8")
        RECORD.write_text(record(results), encoding="utf-8")
    return int(any(counts[kind] for kind in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
