"""The prompts of a benchmark: from the file that ships, from a path, or from the Hugging Face Hub; and a user's own.

Prompts come in a fixed shuffled order, by a hash of their text: the first n of them are a fair draw, the same whatever
the order of the file, and a larger draw contains a smaller one. ``inspect eval --limit`` takes such a draw, too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_mote.benchmarks.sources import BENCHMARKS, Benchmark
from axolotl_mote.benchmarks.tables import Row, read_file
from axolotl_mote.chain.questions import ROW_COLUMNS, parse_question_row, question_id
from axolotl_mote.chain.quoting import encodable
from axolotl_mote.files import raise_faults

log = logging.getLogger(__name__)

_MAX_SHOWN = 10
_MAX_ID = 200


@dataclass(frozen=True)
class Prompt:
    """An evaluation prompt.

    Args:
        id: Unique in its benchmark.
        messages: A dialogue that ends in a user turn.
        category: As the benchmark has it; "" if it has none.
        label: "safe", "unsafe" or None; see ``Benchmark``. A user's own prompts may have any label.
        target: The right answer, where there is one.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    category: str = ""
    label: str | None = None
    target: str | None = None


def load_prompts(
    benchmark: str,
    *,
    path: str | Path | None = None,
    subset: str = "all",
    limit: int | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    revision: str | None = None,
) -> list[Prompt]:
    """The prompts of a benchmark, in a fixed shuffled order.

    Args:
        benchmark: A name in ``BENCHMARKS``.
        path: The whole benchmark instead of the part that ships: a data file with the columns of the original, or
            "hub" for the data set on the Hugging Face Hub, or the name of another data set there. Rows without a prompt
            and repeated prompts are left out with a warning that names the rows.
        subset: For xstest all, safe or unsafe.
        limit: At most this many.
        seed: Decides the order.
        data_dir: Folder inside a data set of the hub, such as harmless-base.
        revision: Revision of a data set of the hub.

    Raises:
        ValueError: If the name or subset is unknown, the path cannot be read or holds another set, the file that ships
            was changed, or no prompt is left.
    """
    known = _find(benchmark)
    if subset not in known.subsets:
        raise ValueError(f"subset must be {' or '.join(known.subsets)}; got {subset!r} for {benchmark}. Correct it.")
    if path is None:
        rows: Iterable[Row] = _shipped_rows(known)
    elif not str(path).strip():
        raise ValueError("path must name a file or a data set; got an empty one. Leave it out for the part that ships.")
    elif (found := read_file(Path(str(path)))) is not None:
        rows = found
    else:
        rows = _hub_rows(known, str(path), data_dir, revision)
    prompts, faults = _read(rows, known.columns, lambda row, messages: _official(known, row, messages))
    if faults:
        shown = "; ".join([*faults[:_MAX_SHOWN], *(["..."] if len(faults) > _MAX_SHOWN else [])])
        log.warning("%s: %d rows are left out: %s", path or known.file.name, len(faults), shown)
    prompts = [prompt for prompt in prompts if subset in ("all", prompt.label)]
    if not prompts:
        raise ValueError(
            f"{path or known.file} must hold prompts in column {' or '.join(known.columns)}; got none"
            f"{'' if subset == 'all' else f' of subset {subset}'}. Use the columns of the original."
        )
    return _draw(prompts, limit, seed)


def load_own_prompts(path: str | Path, *, limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """A user's own prompts, in a fixed shuffled order.

    Args:
        path: A data file. A row holds ``messages``, ``prompt``, ``question`` or ``chosen``; it may hold ``id``,
            ``category``, ``label`` and ``target``.
        limit: At most this many.
        seed: Decides the order.

    Raises:
        ValueError: If the file cannot be read or holds no row; or if rows hold no prompt, or repeat a prompt or an id:
            all of them at once.
    """
    rows = read_file(Path(str(path)))
    if rows is None:
        raise ValueError(f"path must be an existing file; got {path}. Correct the path.")
    prompts, faults = _read(rows, ROW_COLUMNS, _own)
    raise_faults(faults, f"{path} must hold one prompt per row; got {{faults}}.")
    if not prompts:
        raise ValueError(f"{path} must hold prompts; got no row. Add one JSON object per line.")
    return _draw(prompts, limit, seed)


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of prompts, labels and targets, whatever their order and ids: the same digest, the same measurement."""
    lines = sorted(json.dumps([list(p.messages), p.category, p.label, p.target], sort_keys=True) for p in prompts)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _find(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark must be {', '.join(sorted(BENCHMARKS))}; got {name!r}. Correct the name.")
    return BENCHMARKS[name]


def _shipped_rows(benchmark: Benchmark) -> Iterator[Row]:
    """The rows that ship, once the file is known to be unchanged."""
    try:
        content = benchmark.file.read_bytes()
    except OSError as error:
        raise ValueError(f"{benchmark.file} must be readable; got: {error}. Install the package again.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != benchmark.sha256:
        raise ValueError(
            f"{benchmark.file} must have the SHA-256 {benchmark.sha256}; got {found}. Install the package again, or "
            "use a file of your own by path."
        )
    # Not splitlines: prompts may hold other line breaks.
    yield from enumerate((json.loads(line) for line in content.decode().split("\n") if line), start=1)


def _hub_rows(benchmark: Benchmark, path: str, data_dir: str | None, revision: str | None) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    hub, name, split = benchmark.hub
    path = hub if path == "hub" else path
    try:
        rows = load_dataset(path, name if path == hub else None, split=split, data_dir=data_dir, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"path must be a data file, hub, or a data set with split {split}; got {path}: {error}. Correct it, or "
            "download the file."
        ) from error
    yield from enumerate(map(dict, rows), start=1)


def _read(rows: Iterable[Row], columns: Sequence[str], make: Any) -> tuple[list[Prompt], list[str]]:
    """The prompts in rows, and the faults of the other rows."""
    prompts: list[Prompt] = []
    faults: list[str] = []
    texts: dict[str, int] = {}
    ids: dict[str, int] = {}
    for number, row in rows:
        column = next((name for name in columns if row.get(name)), None)
        if column is None:
            faults.append(f"row {number}: a row must hold {' or '.join(columns)}; got none")
            continue
        try:
            messages, _ = parse_question_row(row, column)
        except (ValueError, TypeError, AttributeError) as error:
            faults.append(f"row {number}: {column} must hold text or a dialogue with a user turn; got {error}")
            continue
        prompt = make(row, messages)
        if not prompt.id.isprintable() or len(prompt.id) > _MAX_ID:  # it becomes the name of a file in logs
            faults.append(f"row {number}: an id must be at most {_MAX_ID} printable characters; got {prompt.id[:50]!r}")
            continue
        text = question_id(messages)
        if text in texts or prompt.id in ids:
            what, first = ("prompt", texts[text]) if text in texts else (f"id {prompt.id!r}", ids[prompt.id])
            faults.append(f"row {number}: prompts and ids must be unique; got the {what} of row {first}")
            continue
        texts[text] = ids[prompt.id] = number
        prompts.append(prompt)
    return prompts, faults


def _official(benchmark: Benchmark, row: dict[str, Any], messages: list[dict[str, str]]) -> Prompt:
    category = next((encodable(str(row[name])) for name in benchmark.category if row.get(name)), "")
    return Prompt(_id(row, messages), tuple(messages), category, benchmark.label(row))


def _own(row: dict[str, Any], messages: list[dict[str, str]]) -> Prompt:
    label, target = row.get("label"), row.get("target")
    return Prompt(
        _id(row, messages),
        tuple(messages),
        "" if row.get("category") is None else encodable(str(row["category"])),
        None if label is None else encodable(str(label)),
        None if target is None else encodable(str(target)),
    )


def _id(row: dict[str, Any], messages: list[dict[str, str]]) -> str:
    given = row.get("id")
    return question_id(messages) if given is None or not str(given).strip() else str(given)


def _draw(prompts: list[Prompt], limit: int | None, seed: int) -> list[Prompt]:
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit must be a whole number of at least 1; got {limit!r}. Leave it out for all prompts.")
    return sorted(prompts, key=lambda p: hashlib.sha256(f"{seed} {question_id(p.messages)}".encode()).digest())[:limit]
