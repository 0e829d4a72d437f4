"""Answers a file of questions in several modes, as ``axolotl mote generate`` does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_mote.chain.questions import Question
from axolotl_mote.chain.result import refused_row
from axolotl_mote.chain.steps import ADAPTIVE, VERIFY, chain_form, parse_form
from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.files import folder_digest
from axolotl_mote.generation.answers import FORMAT, AnswerFile, answer_row
from axolotl_mote.generation.api import generate_chain
from axolotl_mote.generation.decoding import length_fault
from axolotl_mote.generation.folder import read_config_values
from axolotl_mote.generation.grammar import make_plan
from axolotl_mote.generation.loading import codec_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL = "all"

Modes = dict[str, str | list[str]]
"""Mode name, as in the output -> what ``generate_chain`` takes for ``steps``."""


def parse_mode(mode: str) -> str | list[str]:
    """A mode as a person types it -> what ``generate_chain`` takes for ``steps``."""
    return mode if mode in (ADAPTIVE, VERIFY) else parse_form(mode)


def check_mode(steps: str | Sequence[str], vocabulary: StepVocabulary, check: bool) -> None:
    """Check a mode against the steps of a model.

    Raises:
        ValueError: If it names steps that the model does not have, or breaks their order.
    """
    if steps != VERIFY:
        make_plan(steps, vocabulary, check)


def expand_modes(modes: Sequence[str], vocabulary: StepVocabulary, check: bool = False) -> Modes:
    """Modes as a person types them, by name; "all" is every chain form, adaptive and verify.

    Raises:
        ValueError: As ``check_mode``.
    """
    every: list[str | list[str]] = [*vocabulary.fixed_forms(), ADAPTIVE, VERIFY]
    chosen: Modes = {}
    for mode in modes:
        for steps in every if mode == ALL else [parse_mode(mode)]:
            check_mode(steps, vocabulary, check)
            chosen[steps if isinstance(steps, str) else chain_form(steps)] = steps
    return chosen


class Runner:
    """Answers windows of questions in every mode and writes each batch as soon as it is done.

    Args:
        model: From ``load_mote``.
        tokenizer: From ``load_mote``.
        modes: The modes.
        output: Where answers go, and which are there already.
        settings: Further arguments for ``generate_chain``.
        seed: Seed of sampling; None for greedy decoding.
        check: Whether the trained check step judges the answers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        modes: Modes,
        output: AnswerFile,
        settings: dict[str, Any],
        seed: int | None = None,
        check: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.modes, self.output = model, tokenizer, modes, output
        self.settings, self.seed, self.check = settings, seed, check
        self.codec = codec_for(model, tokenizer)

    def answer(self, window: Sequence[Question]) -> None:
        """Answer those questions of a window that have no answer yet."""
        for mode, steps in self.modes.items():
            todo = [q for q in window if not self.output.holds(q.row, mode)]
            faults = {q.row: fault for q in todo if (fault := self._refusal(q))}
            fitting = [q for q in todo if q.row not in faults]
            chains = generate_chain(
                self.model,
                self.tokenizer,
                [q.messages for q in fitting],
                steps,
                check=self.check and mode != VERIFY,
                batch_size=max(1, len(fitting)),
                seed=None if self.seed is None else self.seed + window[0].row,
                **self.settings,
            )
            rows = {q.row: chain.to_row() for q, chain in zip(fitting, chains, strict=True)}
            rows |= {row: refused_row(self.codec.vocabulary, fault) for row, fault in faults.items()}
            if todo:
                self.output.append(answer_row(q, mode, self.output.run, rows[q.row]) for q in todo)

    def _refusal(self, question: Question) -> str | None:
        """Why a question cannot be answered: the chat template refuses it, or it leaves no room for an answer."""
        try:
            needed = len(self.codec.encode_question(question.messages)) + self.settings["max_new_tokens"]
        except ValueError as error:
            return str(error)
        return length_fault(self.model, needed)


def run_fingerprint(
    adapter: Path,
    base_model: str | None,
    dtype: str,
    settings: dict[str, Any],
    seed: int | None,
    batch_size: int,
    check: bool,
) -> str:
    """Twelve hexadecimal digits: a hash of the adapter, the base model's folder and everything that shapes an answer.

    Greedy answers do not depend on the batch size, sampled ones do.
    """
    digest = hashlib.sha256()
    base = base_model
    if (adapter / "adapter_config.json").is_file():
        config = read_config_values(adapter)
        for name in ("target_modules", "exclude_modules"):  # sets, which peft writes in any order
            if isinstance(config.get(name), list):
                config[name] = sorted(config[name])
        digest.update(json.dumps(config, sort_keys=True).encode())
        base = base or config.get("base_model_name_or_path")
    for name in ("adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (adapter / name).is_file():
            with (adapter / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    if base and Path(base).is_dir():
        digest.update(folder_digest(Path(base)).encode())
    shape = [FORMAT, base_model, dtype, settings, seed, batch_size if seed is not None else None, check]
    digest.update(json.dumps(shape, sort_keys=True).encode())
    return digest.hexdigest()[:12]
