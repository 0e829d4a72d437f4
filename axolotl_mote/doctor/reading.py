"""Lines about what is read before a model is: versions, the model's family, the configuration, data, markers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from packaging.specifiers import SpecifierSet

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import markers
from axolotl_mote.doctor.lines import FAILED, NOT_TESTED, OK, Finding
from axolotl_mote.doctor.session import Session
from axolotl_mote.files import installed_versions
from axolotl_mote.training.args import CHAIN_TYPE
from axolotl_mote.training.dataset import Columns, encode_rows
from axolotl_mote.versions import TESTED

_PACKAGES = ("axolotl_mote", "axolotl", "torch", "transformers", "peft", "accelerate", "deepspeed", "flash-attn")
_SHOWN = 5  # rows that are named
_ROWS = 1000  # prepared rows that are looked into


def check_versions(session: Session) -> Finding:
    """Installed packages, and whether this package was tested with them."""
    found = installed_versions(_PACKAGES)
    said = ", ".join(f"{name} {found.get(name, 'missing')}" for name in _PACKAGES)
    if session.raw.get("deepspeed") and "deepspeed" not in found:
        return Finding(FAILED, f"{said}; the configuration needs deepspeed", "deepspeed")
    untested = [
        f"{name} {number} (tested: {TESTED[name]})"
        for name, number in found.items()
        if name in TESTED and not SpecifierSet(TESTED[name]).contains(number.partition("+")[0], prereleases=True)
    ]
    return (
        Finding(NOT_TESTED, f"{said}; not among the tested ones: {', '.join(untested)}")
        if untested
        else Finding(OK, said)
    )


def check_family(session: Session) -> Finding:
    """What the support matrix, which ships with this package, says of the model's family."""
    matrix = json.loads(files(__package__).joinpath("families.json").read_text(encoding="utf-8"))
    cfg = session.cfg
    # The text model inside one that also reads images has a line of its own.
    named = [name for name in (cfg.model_config_type_text, cfg.model_config_type) if name]
    family = next((name for name in named if name in matrix["families"]), str(named[-1]))
    tried = ", ".join(f"{name} {number}" for name, number in matrix["versions"].items())
    if family not in matrix["families"]:
        return Finding(NOT_TESTED, f"{family} is not in the support matrix, which is of {tried}")
    cells = dict(zip(matrix["columns"], matrix["families"][family], strict=True))
    used = {"training": "base_model"}
    if any(session.options.dropout_probabilities):
        used["step dropout"] = "mote.step_dropout"
    if cfg.sample_packing:
        used["packing"] = "sample_packing"
    if key := next((key for key in ("load_in_4bit", "load_in_8bit") if cfg[key]), None):
        used["quantized base"] = key
    said = f"{family}, tiny and random with {tried}: " + ", ".join(f"{name} {cell}" for name, cell in cells.items())
    refused = [key for name, key in used.items() if cells[name] == "refused"]
    if refused:
        return Finding(FAILED, said, refused[0])
    inexact = [name for name in used if cells[name] != "right"]
    if inexact:
        return Finding(NOT_TESTED, f"{said}; the lines below decide about {', '.join(inexact)}")
    return Finding(OK, said)


def check_configuration(session: Session) -> Finding:
    """axolotl's validation and the plugin's refusals."""
    cfg, options = session.validated, session.options
    dropout = ", ".join(f"{p:g}" for p in options.dropout_probabilities)
    return Finding(
        OK,
        f"steps {', '.join(options.steps)}; rank {cfg.lora_r} each; step_dropout {dropout or 'none'}; question_routing "
        f"{options.question_routing}",
    )


# --- data -----------------------------------------------------------------------------------------------------------


def check_data(session: Session) -> Finding:
    """Chains that are longer than sequence_len, and whether every step keeps some."""
    limit, codec = int(session.cfg.sequence_len), session.codec
    dropped: list[tuple[int, str]] = []
    chains: Counter[str] = Counter()
    total = longest = 0
    for where, lengths, forms in _encoded(session):
        total += len(lengths)
        longest = max([longest, *lengths])
        for row, (length, form) in enumerate(zip(lengths, forms, strict=True), start=1):
            if length > limit:
                dropped.append((length, f"{where} row {row}: {length} tokens"))
            else:
                chains.update(form)
    said = f"{total} chains, the longest {longest} tokens, sequence_len {limit}; "
    said += ", ".join(f"{step} in {chains[step]}" for step in codec.steps)
    if dropped:
        worst = [text for _, text in sorted(dropped, reverse=True)[:_SHOWN]]
        more = f", and {len(dropped) - _SHOWN} more" if len(dropped) > _SHOWN else ""
        said += f"; {len(dropped)} will be dropped ({', '.join(worst)}{more})"
    figures = {"chains": float(total), "dropped": float(len(dropped)), "longest": float(longest)}
    empty = [step for step in codec.steps if not chains[step]]
    if empty:
        key = "sequence_len" if dropped else "mote.steps"
        return Finding(
            FAILED, f"no chain is left with {', '.join(empty)}, so its expert never learns: {said}", key, figures
        )
    _ = session.data  # axolotl's own preparation of them
    return Finding(OK, said, figures=figures)


def _encoded(session: Session) -> Iterator[tuple[str, list[int], list[set[str]]]]:
    """Of every data set with chains: its name, and the tokens and the steps of all rows, the too long ones too."""
    from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config

    cfg, codec = session.cfg, session.codec
    kinds = codec.vocabulary.kinds
    with session.no_caching():
        for entry in datasets_with_name_generator(cfg.datasets):
            if entry.type != CHAIN_TYPE:
                continue
            rows: Any = load_dataset_with_config(entry, cfg.hf_use_auth_token)
            if isinstance(rows, dict):
                rows = rows[entry.split if entry.split in rows else "train"]
            where, columns = str(entry.path), Columns.of(entry)
            encoded, _ = encode_rows(rows, codec, where, cfg.dataset_num_proc, columns=columns)
            ids = encoded["input_ids"]
            steps = [{codec.steps[kinds[token] - 1] for token in row if kinds.get(token, 0) > 0} for row in ids]
            yield where, [len(row) for row in ids], steps


# --- markers --------------------------------------------------------------------------------------------------------


def check_markers(session: Session) -> Finding:
    """Markers are single tokens, open and close the steps of every chain, and cannot be typed."""
    codec = session.codec
    rows = session.data.train_dataset.select(range(min(_ROWS, len(session.data.train_dataset))))["input_ids"]
    faults = [*_faults_of_tokenizer(codec, session), *_faults_of_typed_markers(codec), *_faults_of_rows(codec, rows)]
    if faults:
        return Finding(FAILED, "; ".join(faults[:_SHOWN]), "chat_template")
    names = ", ".join(
        f"{text} {token}" for text, token in zip(markers(codec.steps), codec.vocabulary.marker_ids, strict=True)
    )
    return Finding(OK, f"{names}; whole in {len(rows)} prepared chains, also after the tokenizer is saved")


def _faults_of_tokenizer(codec: ChainCodec, session: Session) -> Iterator[str]:
    """The tokenizer's own, before and after it is saved; a chain of words comes back as it was."""
    from transformers import AutoTokenizer

    said = {step: f"the text of {step}" for step in codec.steps} | ({"check": "safe"} if "check" in codec.steps else {})
    messages = [{"role": "user", "content": "Which colors has a traffic light?"}]
    row = {"messages": messages, **said}
    ids = codec.encode_chain(row)["input_ids"]
    folder = session.folder / "tokenizer"
    codec.tokenizer.save_pretrained(folder)
    again = ChainCodec(AutoTokenizer.from_pretrained(folder), codec.steps)
    if again.vocabulary != codec.vocabulary or again.encode_chain(row)["input_ids"] != ids:
        yield "a saved and reloaded tokenizer encodes a chain differently"
    question = codec.encode_question(messages)
    if "traffic light" not in codec.tokenizer.decode(question):
        yield "the chat template leaves out the user's text"
    if ids[: len(question)] != question:
        yield "a chain does not begin with its question"
    texts = codec.parse(ids[len(question) :]).texts
    lost = [step for step in codec.steps if texts.get(step, "").strip() != said[step]]
    if lost:
        yield f"a chain does not come back from its tokens: {', '.join(lost)} lost or changed"


def _faults_of_typed_markers(codec: ChainCodec) -> Iterator[str]:
    typed = codec.encode_question([{"role": "user", "content": "Please. " + " ".join(markers(codec.steps))}])
    if set(typed) & set(codec.vocabulary.marker_ids):
        yield "markers that a user types become real ones"


def _faults_of_rows(codec: ChainCodec, rows: Sequence[Sequence[int]]) -> Iterator[str]:
    """Prepared rows whose markers do not open and close one step after another."""
    kinds, answer = codec.vocabulary.kinds, codec.vocabulary.step_id(codec.vocabulary.answer)
    broken = []
    for number, row in enumerate(rows, start=1):
        found = [kinds[token] for token in row if token in kinds]
        opened = found[::2]
        if found[1::2] != [-step for step in opened] or sorted(set(opened)) != opened or answer not in opened:
            broken.append(number)
    if broken:
        shown = ", ".join(map(str, broken[:_SHOWN]))
        yield f"{len(broken)} of {len(rows)} prepared chains have no whole steps (the first: {shown})"
