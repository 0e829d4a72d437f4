"""Chain data sets for axolotl: files checked before any library reads them, rows encoded, long chains dropped."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.rows import ChainDataError, check_rows
from axolotl_mote.chain.steps import chain_form
from axolotl_mote.files import read_jsonl
from axolotl_mote.training.args import read_options

LOG = logging.getLogger("axolotl.mote")  # below axolotl's logger, so that its handlers print it

_COLORS = ("default", "yellow", "cyan", "green", "magenta", "blue", "red")


def check_file(path: Path, steps: Sequence[str]) -> None:
    """Check a local .json or .jsonl file before any library reads it, so that faults name their rows.

    Raises:
        ChainDataError: As ``check_rows``.
    """
    rows = _read_json_list(path) if _holds_list(path) else list(read_jsonl(path))
    if not rows:
        raise ChainDataError(f"{path} must hold at least one chain; got none. Add rows.")
    check_rows(rows, steps, str(path))


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


def chain_strategy(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> Any:
    """axolotl's wrapping strategy for chain data; see ``axolotl_mote.chain.load``."""
    from axolotl.prompt_tokenizers import DatasetWrappingStrategy

    codec = ChainCodec(tokenizer, read_options(cfg).steps)
    _ = codec.vocabulary  # fails here, not at the first row, if the tokenizer does not know the markers
    where = str((ds_cfg or {}).get("path") or "the data set")

    class ChainStrategy(DatasetWrappingStrategy):
        def wrap_dataset(
            self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
        ) -> Any:
            encoded = encode_dataset(dataset, codec, cfg.sequence_len, where, process_count, bool(keep_in_memory))
            if cfg.debug:
                for input_ids in encoded[:3]["input_ids"]:
                    show_routing(codec, input_ids)
            return encoded

    return ChainStrategy()


def encode_dataset(
    dataset: Any,
    codec: ChainCodec,
    sequence_len: int,
    where: str = "the data set",
    process_count: int | None = None,
    keep_in_memory: bool = False,
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

    Returns:
        A data set of ``input_ids``, ``attention_mask`` and ``labels``, at most N rows.

    Raises:
        ChainDataError: If a row has a fault, or if no chain is short enough.
    """
    steps = codec.steps
    check_rows(enumerate(dataset, start=1), steps, where)
    if not len(dataset):
        raise ChainDataError(f"{where} must hold at least one chain; got none. Add rows.")
    forms = Counter(chain_form(step for step in steps if (row.get(step) or "").strip()) for row in dataset)
    encoded = dataset.map(
        codec.encode_chain,
        remove_columns=dataset.column_names,
        num_proc=process_count,
        keep_in_memory=keep_in_memory,
        desc="Encoding chains",
    )
    kept = encoded.filter(
        lambda ids: len(ids) <= sequence_len, input_columns="input_ids", keep_in_memory=keep_in_memory
    )
    dropped = len(encoded) - len(kept)
    if dropped:
        LOG.warning(
            "%s: dropped %d of %d chains longer than sequence_len %d.", where, dropped, len(encoded), sequence_len
        )
    if not len(kept):
        longest = max((len(ids) for ids in encoded["input_ids"]), default=0)
        raise ChainDataError(
            f"sequence_len must fit at least one chain of {where}; got {sequence_len}, all {dropped} chains are longer "
            f"(the longest has {longest} tokens). Raise sequence_len."
        )
    LOG.info(
        "%s: kept %d of %d chains; chain forms of all: %s", where, len(kept), len(encoded), dict(forms.most_common())
    )
    return kept


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
