"""Chain data sets for axolotl: files checked before any library reads them, rows encoded, long chains dropped."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.compute as pc
from jinja2 import TemplateError
from tqdm import tqdm

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.rows import ChainDataError, SeenIds, check_row, check_rows, raise_row_faults
from axolotl_mote.chain.steps import chain_form
from axolotl_mote.chain.templates import open_block, way_to_close
from axolotl_mote.files import read_jsonl
from axolotl_mote.training.args import read_options

LOG = logging.getLogger("axolotl.mote")  # below axolotl's logger, so that its handlers print it

_SOON = 3
"""Seconds after which a check shows its progress."""

_FAULTS, _FORM = "_mote_faults", "_mote_form"
"""Columns that hold more than tokens until all rows are encoded."""

_COLORS = ("default", "yellow", "cyan", "green", "magenta", "blue", "red")


@dataclass(frozen=True)
class Columns:
    """Where the rows of a data set keep the dialogue.

    Args:
        messages: Column of the turns.
        role: Key of a turn that holds its role.
        content: Key of a turn that holds its text.
        roles: Role in the rows -> ours, of those that differ.
    """

    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """The columns that an entry under `datasets:` names."""
        keys = entry.get("message_property_mappings") or {}
        return cls(
            entry.get("field_messages") or "messages",
            keys.get("role") or "role",
            keys.get("content") or "content",
            {theirs: ours for ours, names in (entry.get("roles") or {}).items() for theirs in names},
        )

    def read(self, row: Any) -> Any:
        """A row with its dialogue in `messages`, as {role, content}; what is no row, or no turn, stays as it is."""
        if not isinstance(row, Mapping):
            return row
        turns = row.get(self.messages)
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            return {**row, "messages": turns}
        return {**row, "messages": [self._turn(turn) for turn in turns]}

    def _turn(self, turn: Any) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        role = turn.get(self.role)
        return {
            "role": self.roles.get(role, role) if isinstance(role, str) else role,
            "content": turn.get(self.content),
        }

    def __str__(self) -> str:
        """What to add to the name of the data set where a message speaks of its columns; empty for the usual ones."""
        named = {"messages": self.messages, "role": self.role, "content": self.content}
        other = [f"{ours} from {theirs!r}" for ours, theirs in named.items() if ours != theirs]
        return f" ({', '.join(other)})" if other else ""


PLAIN_COLUMNS = Columns()


def check_file(path: Path, steps: Sequence[str], columns: Columns = PLAIN_COLUMNS) -> None:
    """Check a local .json or .jsonl file before any library reads it, so that faults name their rows.

    Args:
        path: The file.
        steps: The steps to train.
        columns: Where its rows keep the dialogue.

    Raises:
        ChainDataError: As ``check_rows``.
    """
    rows = iter(_read_json_list(path)) if _holds_list(path) else read_jsonl(path)  # the latter line by line
    if (first := next(rows, None)) is None:
        raise ChainDataError(f"{path} must hold at least one chain; got none. Add rows.")
    shown = tqdm(chain([first], rows), desc=f"Checking {path.name}", unit=" rows", delay=_SOON)
    check_rows(((number, columns.read(row)) for number, row in shown), steps, f"{path}{columns}")


def _holds_list(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                return line.lstrip().startswith(b"[")
    return False


def _read_json_list(path: Path) -> list[tuple[int, Any]]:
    content = path.read_bytes()
    try:
        return list(enumerate(json.loads(content.decode("utf-8")), start=1))
    except json.JSONDecodeError as error:
        raise ChainDataError(
            f"{path} must be JSON; got {error.msg} at line {error.lineno}. Correct the line."
        ) from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ChainDataError(f"{path} must be UTF-8; got another encoding at line {line}. Convert the file.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
        raise ChainDataError(f"{path} must be JSON that can be read; got: {error}. Correct the row.") from None


def chain_strategy(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> Any:
    """axolotl's wrapping strategy for chain data; see ``axolotl_mote.chain.load``."""
    from axolotl.prompt_tokenizers import DatasetWrappingStrategy

    codec = ChainCodec(tokenizer, read_options(cfg).steps)
    _ = codec.vocabulary  # fails here, not at the first row, if the tokenizer does not know the markers
    entry = ds_cfg or {}
    columns = Columns.of(entry)
    where = str(entry.get("path") or "the data set")
    if entry.get("shards"):  # axolotl shuffles first
        where += f", shuffled with seed {cfg.seed}, shard {entry.get('shards_idx') or 0} of {entry['shards']}"
    warn_of_open_block(tokenizer)

    class ChainStrategy(DatasetWrappingStrategy):
        def wrap_dataset(
            self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
        ) -> Any:
            encoded = encode_dataset(
                dataset, codec, cfg.sequence_len, where, process_count, bool(keep_in_memory), columns
            )
            if cfg.debug:
                for input_ids in encoded[:3]["input_ids"]:
                    show_routing(codec, input_ids)
            return encoded

    return ChainStrategy()


def warn_of_open_block(tokenizer: Any) -> None:
    """Warn if the generation prompt leaves a block such as ``<think>`` open, so that chains would stand inside it."""
    try:
        tag = open_block(tokenizer)
    except TemplateError:  # it names the rows that it refuses
        return
    if tag is None:
        return
    closing = ", ".join(f"{name}: {str(value).lower()}" for name, value in (way_to_close(tokenizer) or {}).items())
    remedy = f"Set chat_template_kwargs: {{{closing}}}." if closing else "Use a chat_template that closes it."
    message = (
        f"The generation prompt of the chat template opens {tag} and does not close it, so every chain would stand "
        f"inside. {remedy}"
    )
    LOG.warning(message)


def encode_dataset(
    dataset: Any,
    codec: ChainCodec,
    sequence_len: int,
    where: str = "the data set",
    process_count: int | None = None,
    keep_in_memory: bool = False,
    columns: Columns = PLAIN_COLUMNS,
) -> Any:
    """Check and encode a data set of chain rows; chains longer than ``sequence_len`` are dropped and counted.

    A chain is never truncated: half a step would be trained as a whole one.

    Args:
        dataset: A Hugging Face data set of N rows.
        codec: Encodes the rows.
        sequence_len: Tokens of the longest chain that is kept.
        where: The data set's name, for messages.
        process_count: Worker processes; None for none.
        keep_in_memory: Leave the data set's cache files alone.
        columns: Where the rows keep the dialogue.

    Returns:
        A data set of ``input_ids``, ``attention_mask`` and ``labels``, at most N rows.

    Raises:
        ChainDataError: If a row has a fault, or if no chain is short enough.
    """
    encoded, forms = encode_rows(dataset, codec, where, process_count, keep_in_memory, columns)
    lengths = pc.list_value_length(encoded.data.column("input_ids")).to_numpy()
    short = np.flatnonzero(lengths <= sequence_len)
    dropped = len(encoded) - len(short)
    if dropped:
        LOG.warning(
            "%s: dropped %d of %d chains longer than sequence_len %d.", where, dropped, len(encoded), sequence_len
        )
    if not len(short):
        raise ChainDataError(
            f"sequence_len must fit at least one chain of {where}; got {sequence_len}, all {dropped} chains are longer "
            f"(the longest has {lengths.max()} tokens). Raise sequence_len."
        )
    LOG.info(
        "%s: kept %d of %d chains; chain forms of all: %s", where, len(short), len(encoded), dict(forms.most_common())
    )
    return encoded.select(short, keep_in_memory=keep_in_memory) if dropped else encoded


def encode_rows(
    dataset: Any,
    codec: ChainCodec,
    where: str = "the data set",
    process_count: int | None = None,
    keep_in_memory: bool = False,
    columns: Columns = PLAIN_COLUMNS,
) -> tuple[Any, Counter[str]]:
    """Check and encode all rows of a data set, whatever their length; the arguments are those of ``encode_dataset``.

    Returns:
        A data set of ``input_ids``, ``attention_mask`` and ``labels``, N rows, and how many have each chain form.

    Raises:
        ChainDataError: If there are no rows, or one has a fault.
    """
    if not len(dataset):
        raise ChainDataError(f"{where} must hold at least one chain; got none. Add rows.")
    encoded = dataset.map(
        # The code is a part of the name under which the result is cached.
        partial(_encode_row, codec=codec, columns=columns, code=code_digest()),
        remove_columns=dataset.column_names,
        num_proc=process_count,
        keep_in_memory=keep_in_memory,
        desc="Encoding chains",
    )
    ids = dataset["id"][:] if "id" in dataset.column_names else repeat(None, len(dataset))
    seen, faults = SeenIds(), []
    for number, (found, row_id) in enumerate(zip(encoded.data.column(_FAULTS).to_pylist(), ids, strict=True), start=1):
        of_row = seen.add(number, row_id) + (json.loads(found) if found else [])
        faults += [f"row {number}: {fault}" for fault in of_row]
    raise_row_faults(faults, f"{where}{columns}")
    forms = Counter(encoded.data.column(_FORM).to_pylist())
    return encoded.remove_columns([_FAULTS, _FORM]), forms


def _encode_row(row: Mapping[str, Any], codec: ChainCodec, columns: Columns, code: str) -> dict[str, Any]:
    """An encoded row with its chain form, or its faults as JSON; always of the same types."""
    chain_row = columns.read(row)
    faults = check_row(chain_row, codec.steps)
    if not faults:
        try:
            form = chain_form(step for step in codec.steps if (row.get(step) or "").strip())
            return {**codec.encode_chain(chain_row), _FAULTS: "", _FORM: form}
        except ValueError as error:  # the chat template refuses it
            faults = [str(error)]
    return {"input_ids": [0], "attention_mask": [0], "labels": [0], _FAULTS: json.dumps(faults), _FORM: ""}


@cache
def code_digest() -> str:
    """Digest of the code that decides how rows are encoded: what it has written is used again by it alone."""
    import axolotl_mote.chain

    files = [Path(__file__), *sorted(Path(axolotl_mote.chain.__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def show_routing(codec: ChainCodec, input_ids: Sequence[int]) -> None:
    """Print tokens colored by step, the question plain: the view of ``axolotl preprocess --debug``."""
    from rich.console import Console
    from rich.text import Text

    text = Text("routing: question ")
    for number, step in enumerate(codec.steps, start=1):
        text.append(f"{step} ", style=_COLORS[number % len(_COLORS)])
    text.append("\n")
    for step_id, stretch in codec.stretches(input_ids):
        text.append(stretch, style=_COLORS[step_id % len(_COLORS)])
    # The terminal wraps the text. A newline of ours would look like a part of it.
    Console().print(text, soft_wrap=True)
