"""A chain row becomes tokens: `type: axolotl_mote.chain`.

The text trained on is the chat template of `messages` with the generation prompt, then each present step as marker,
text, end marker, then the template's end-of-turn token. User and step texts can never produce a marker or any other
special token: this module is the safety boundary, for training and for inference alike. It knows nothing of models.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from axolotl_mote.steps import (
    CHECK,
    DEFAULT_STEPS,
    IGNORE_INDEX,
    answer_step,
    end_marker,
    markers,
    start_marker,
    validate_steps,
)

LOG = logging.getLogger("axolotl.mote")  # below axolotl's logger, so that its handlers print it

_ROLES = ("system", "user", "assistant")
_MAX_REPORTED = 50


class ChainDataError(ValueError):
    """Rows of a chain data set that cannot be trained on; the message lists them with row, field and remedy."""


# --- encoding -------------------------------------------------------------------------------------------------------


def _special_strings(tokenizer: PreTrainedTokenizerBase, steps: Sequence[str]) -> re.Pattern[str]:
    """Everything that must not be recognised inside a text: markers, special tokens, and our own stand-in."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(markers(steps)) | set(tokenizer.all_special_tokens)
    return re.compile("|".join(re.escape(text) for text in sorted(special, key=len, reverse=True) if text) + "|\ue000")


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text as ordinary text: no special token is recognised in it and none is added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def _normalize(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Text as the tokenizer sees it when it looks for special tokens."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return text if normalizer is None else str(normalizer.normalize_str(text))


def encode_question(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], steps: Sequence[str] = ()
) -> list[int]:
    """Encode a dialogue with its generation prompt; what looks like a special token in a message stays text.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The dialogue, ending in a user turn.
        steps: Steps whose markers are guarded besides every special token that the tokenizer knows.

    Returns:
        Token ids, as ``apply_chat_template`` gives them for messages without special strings.

    Raises:
        ValueError: If a role is unknown (templates print roles as they are), or the chat template refuses a turn.
    """
    for message in messages:
        if message["role"] not in _ROLES:
            raise ValueError(f"role must be one of {_ROLES}; got {message['role']!r}. Rename it.")
    pattern = _special_strings(tokenizer, steps)
    hostile: list[str] = []

    def stand_in(match: re.Match[str]) -> str:
        hostile.append(match.group())
        return f"\ue000{len(hostile) - 1}\ue001"

    def guard(text: str) -> str:
        # A normalizer may turn a look-alike into a special token: such a text is encoded as text from end to end.
        looks_alike = any(pattern.search(_normalize(tokenizer, piece)) for piece in pattern.split(text))
        return re.sub("(?s).+", stand_in, text) if looks_alike else pattern.sub(stand_in, text)

    # The stand-ins keep the template from seeing what they replace; each is then encoded as ordinary text. A special
    # token would split the text at the same places, so all other text is encoded as usual.
    # Further fields of a turn are left out: some templates render them.
    safe = [{"role": message["role"], "content": guard(message["content"])} for message in messages]
    try:
        rendered: str = tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"messages must suit the chat template; it says: {error} Change the turns.") from error
    ids: list[int] = []
    for position, piece in enumerate(re.split("\ue000(\\d+)\ue001", rendered)):
        if position % 2:
            ids += encode_text(tokenizer, hostile[int(piece)])
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template puts after an assistant's text, up to and including the first special token."""
    text = "\ue000"
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}], tokenize=False
    )
    special = set(tokenizer.all_special_ids)
    special |= {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids: list[int] = tokenizer(rendered.split(text)[-1], add_special_tokens=False)["input_ids"]
    for position, token_id in enumerate(ids):
        if token_id in special:
            return ids[: position + 1]
    return [tokenizer.eos_token_id]


def marker_ids(tokenizer: PreTrainedTokenizerBase, steps: Sequence[str]) -> list[int]:
    """Ids of the marker tokens, in the order of ``markers(steps)``.

    Raises:
        ValueError: If the tokenizer splits a marker or does not know it as a special token.
    """
    ids = []
    for marker in markers(steps):
        encoded = tokenizer(marker, add_special_tokens=False)["input_ids"]
        known = tokenizer.added_tokens_decoder.get(encoded[-1]) if encoded else None
        if len(encoded) != 1 or known is None or not known.special:
            raise ValueError(
                f"The tokenizer must know {marker!r} as one special token; got {encoded}. "
                "Add the plugin axolotl_mote.MotePlugin, or the markers to special_tokens.additional_special_tokens."
            )
        ids.append(int(encoded[0]))
    return ids


def marker_words(tokenizer: PreTrainedTokenizerBase, steps: Sequence[str]) -> list[list[int]]:
    """Ids of words that describe each marker, from whose mean its row starts; in the order of ``markers(steps)``."""
    return [encode_text(tokenizer, f"{verb} {step.replace('_', ' ')}") for step in steps for verb in ("begin", "end")]


def encode_chain(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, steps: Sequence[str]) -> dict[str, Any]:
    """Encode one valid chain row.

    Args:
        row: A row with `messages` and a column per step; absent or null steps are skipped.
        tokenizer: A tokenizer that knows the markers.
        steps: The steps to train, in order.

    Returns:
        `input_ids`, `attention_mask` and `labels` (-100 on the question), lists of equal length.
    """
    ids_of = dict(zip(markers(steps), marker_ids(tokenizer, steps), strict=True))
    question = encode_question(tokenizer, row["messages"], steps)
    chain: list[int] = []
    for step in steps:
        text = row.get(step)
        if text is not None and text.strip():
            chain += [ids_of[start_marker(step)], *encode_text(tokenizer, text.strip()), ids_of[end_marker(step)]]
    chain += end_of_turn_ids(tokenizer)
    input_ids = question + chain
    return {
        "input_ids": input_ids,
        "attention_mask": [1] * len(input_ids),
        "labels": [IGNORE_INDEX] * len(question) + chain,
    }


# --- checking -------------------------------------------------------------------------------------------------------


def check_row(row: Any, steps: Sequence[str]) -> list[str]:
    """Faults of one row as "field must ...; got ... . Remedy." strings; an empty list means it can be trained on."""
    if not isinstance(row, Mapping):
        return [f"the row must be an object; got {type(row).__name__}. Write one JSON object per line."]
    faults = check_messages(row.get("messages"))
    answer = answer_step(steps)
    for step in steps:
        text = row.get(step)
        if text is not None and not isinstance(text, str):
            faults.append(f"{step} must be a string or null; got {type(text).__name__}. Quote it or set null.")
        elif step == CHECK and text not in (None, "safe", "unsafe"):
            faults.append(f"check must be 'safe', 'unsafe' or null; got {text!r}. Correct or clear it.")
        elif fault := _unicode_fault(text):
            faults.append(f"{step} {fault}")
        elif step == answer and not (text or "").strip():
            faults.append(f"{answer} must be a non-empty string; got {text!r}. Write the answer or drop the row.")
    reasoning = list(steps[: steps.index(answer)])
    present = [isinstance(row.get(step), str) and bool(row[step].strip()) for step in reasoning]
    for earlier, later in zip(range(len(reasoning)), range(1, len(reasoning)), strict=False):
        if present[later] and not present[earlier]:
            faults.append(
                f"{reasoning[later]} must follow {reasoning[earlier]}; got it alone. Write the earlier step, clear the "
                f"later one, or leave {reasoning[earlier]} out of mote.steps."
            )
    return faults


def _unicode_fault(text: Any) -> str | None:
    """JSON can spell halves of characters that no tokenizer and no table can hold."""
    half = re.search("[\ud800-\udfff]", text) if isinstance(text, str) else None
    if half is None:
        return None
    return f"must be valid Unicode; got an unpaired surrogate at character {half.start()}. Correct the text."


def check_messages(messages: Any) -> list[str]:
    """Faults of a dialogue that ends with a question, as "field must ...; got ... . Remedy." strings."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return [f"messages must be a non-empty list of turns; got {messages!r}. Write [{{role, content}}, ...]."]
    faults = []
    for number, turn in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(turn, Mapping):
            faults.append(f"{where} must be an object with role and content; got {type(turn).__name__}. Correct it.")
            continue
        if turn.get("role") not in _ROLES:
            faults.append(f"{where}.role must be one of {_ROLES}; got {turn.get('role')!r}. Rename it.")
        if not isinstance(turn.get("content"), str) or not turn["content"].strip():
            faults.append(f"{where}.content must be a non-empty string; got {turn.get('content')!r}. Write the text.")
        elif fault := _unicode_fault(turn["content"]):
            faults.append(f"{where}.content {fault}")
    last = messages[-1]
    if isinstance(last, Mapping) and last.get("role") in ("system", "assistant"):
        faults.append(
            f"messages must end with a user turn; got {last['role']!r} last. Move the last answer to the step columns."
        )
    return faults


def check_rows(rows: Iterable[tuple[int, Any]], steps: Sequence[str], where: str) -> None:
    """Check all rows and report every fault at once.

    Args:
        rows: Pairs of row number (from 1) and row.
        steps: The steps to train.
        where: The data set's name, for the message.

    Raises:
        ChainDataError: If any row has a fault; the message names row, field and remedy.
    """
    faults: list[str] = []
    first_seen: dict[str, int] = {}
    for number, row in rows:
        if isinstance(row, json.JSONDecodeError):
            faults.append(
                f"row {number}: the line must be JSON; got {row.msg} at column {row.colno}. Correct the line."
            )
            continue
        if isinstance(row, UnicodeDecodeError):
            byte = row.object[row.start]
            faults.append(f"row {number}: the line must be UTF-8; got byte {byte:#x}. Convert the file.")
            continue
        faults += [f"row {number}: {fault}" for fault in check_row(row, steps)]
        row_id = row.get("id") if isinstance(row, Mapping) else None
        if row_id is not None and first_seen.setdefault(str(row_id), number) != number:
            first = first_seen[str(row_id)]
            faults.append(f"row {number}: id must be unique; got {row_id!r} again, first at row {first}. Drop one.")
    if faults:
        shown = faults[:_MAX_REPORTED]
        if len(faults) > len(shown):
            shown.append(f"and {len(faults) - len(shown)} more")
        raise ChainDataError(f"{where} holds {len(faults)} faults; nothing was trained.\n  " + "\n  ".join(shown))


def check_file(path: Path, steps: Sequence[str]) -> None:
    """Check a local .json or .jsonl file before any library reads it, so that the faults name its rows.

    Raises:
        ChainDataError: As ``check_rows``.
    """
    content = path.read_bytes()
    rows: list[tuple[int, Any]] = []
    if content.lstrip().startswith(b"["):
        try:
            rows = list(enumerate(json.loads(content.decode("utf-8")), start=1))
        except json.JSONDecodeError as error:
            raise ChainDataError(
                f"{path} must be JSON; got {error.msg} at line {error.lineno}. Correct the line."
            ) from None
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ChainDataError(
                f"{path} must be UTF-8; got another encoding at line {line}. Convert the file."
            ) from None
    else:
        for number, raw in enumerate(content.split(b"\n"), start=1):
            if raw.strip():
                try:
                    rows.append((number, json.loads(raw.decode("utf-8"))))
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    rows.append((number, error))
    if not rows:
        raise ChainDataError(f"{path} must hold at least one chain; got none. Add rows.")
    check_rows(rows, steps, str(path))


# --- axolotl's entry point ------------------------------------------------------------------------------------------


def show_routing(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], steps: Sequence[str]) -> None:
    """Print tokens coloured by step, the question plain."""
    import torch
    from rich.console import Console
    from rich.text import Text

    from axolotl_mote.config import MoteConfig
    from axolotl_mote.routing import step_ids_from_tokens

    config = MoteConfig(steps=list(steps), marker_ids=marker_ids(tokenizer, steps))
    colours = ["default", "yellow", "cyan", "green", "magenta", "blue", "red"]
    text = Text("routing: question ")
    for number, step in enumerate(steps, start=1):
        text.append(f"{step} ", style=colours[number % len(colours)])
    text.append("\n")
    step_ids = step_ids_from_tokens(torch.tensor([list(input_ids)]), config)[0].tolist()
    # Whole stretches: a character may be spread over several tokens.
    for step_id, stretch in groupby(zip(step_ids, input_ids, strict=True), key=lambda pair: pair[0]):
        text.append(tokenizer.decode([token for _, token in stretch]), style=colours[step_id % len(colours)])
    # The terminal wraps: a newline of ours would look like one of the text.
    Console().print(text, soft_wrap=True)


def load(tokenizer: PreTrainedTokenizerBase, cfg: Any, ds_cfg: Any = None) -> Any:
    """Entry point of `type: axolotl_mote.chain`.

    Args:
        tokenizer: axolotl's tokenizer, with the markers added by the plugin.
        cfg: axolotl's configuration; `mote.steps` and `sequence_len` are read.
        ds_cfg: The data set's entry, for its name in messages.

    Returns:
        axolotl's wrapping strategy: rows in, tokenized rows out.
    """
    from axolotl.prompt_tokenizers import DatasetWrappingStrategy

    options = cfg.get("mote") or {}
    steps = validate_steps(options.get("steps") or DEFAULT_STEPS)
    marker_ids(tokenizer, steps)
    where = str((ds_cfg or {}).get("path") or "the data set")

    class ChainStrategy(DatasetWrappingStrategy):
        def wrap_dataset(
            self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
        ) -> Any:
            return encode_dataset(
                dataset, tokenizer, steps, cfg.sequence_len, where, process_count, bool(keep_in_memory), bool(cfg.debug)
            )

    return ChainStrategy()


def encode_dataset(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    steps: Sequence[str],
    sequence_len: int,
    where: str = "the data set",
    process_count: int | None = None,
    keep_in_memory: bool = False,
    debug: bool = False,
) -> Any:
    """Check and encode a data set of chain rows; chains longer than ``sequence_len`` are dropped and counted.

    A chain is never truncated: half a step would be trained as a whole one.

    Raises:
        ChainDataError: If a row has a fault, or if no chain is short enough.
    """
    check_rows(enumerate(dataset, start=1), steps, where)
    if not len(dataset):
        raise ChainDataError(f"{where} must hold at least one chain; got none. Add rows.")
    forms = Counter("-".join(step for step in steps if (row.get(step) or "").strip()) for row in dataset)
    encoded = dataset.map(
        encode_chain,
        fn_kwargs={"tokenizer": tokenizer, "steps": list(steps)},
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
    LOG.info("%s: kept %d of %d chains; forms of all: %s", where, len(kept), len(encoded), dict(forms.most_common()))
    if debug:
        for input_ids in kept[:3]["input_ids"]:
            show_routing(tokenizer, input_ids, steps)
    return kept
