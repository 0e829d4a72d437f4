"""The build file: its schema, how it is read, and the hash that tells two builds apart.

Keys that change what a model is asked or how it answers are part of the hash. Keys that only say how fast, how long or
from where (server addresses, concurrency, timeouts, budget, the list of questions) are not, so they may change between
two runs of one build. No model or client is imported here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from axolotl_mote.benchmarks.sources import BENCHMARKS
from axolotl_mote.files import folder_digest
from axolotl_mote.schema import Schema, load_yaml

ChainForm = Literal["adaptive", "full", "analysis", "guidance", "response"]
BenchmarkName = Literal["coconot", "hh_rlhf", "strongreject", "xstest"]
STAGES = ("response", "check", "analysis", "guidance")


class QuestionSource(Schema):
    """A source of questions: a JSONL, JSON, CSV, TSV or Parquet file, or a Hugging Face data set."""

    path: str = Field(
        description="File ending in .jsonl, .ndjson, .json, .csv, .tsv (.gz may follow) or .parquet, in any case, or a "
        "Hugging Face data set name."
    )
    column: str | None = Field(
        None,
        description="Column with the question; if left out, it is found by its name (messages, chosen, prompt, ...).",
    )
    name: str | None = Field(None, description="Configuration of a Hugging Face data set.")
    data_dir: str | None = Field(None, description="Folder inside a Hugging Face data set.")
    split: str = Field("train", description="Split of a Hugging Face data set.")
    revision: str | None = Field(None, description="Revision of a Hugging Face data set.")
    limit: int | None = Field(None, ge=1, description="Use at most this many rows, from the top.")
    sample: int | None = Field(
        None,
        ge=1,
        description="Use this many of those rows, drawn with the build's seed; a larger draw contains a smaller one.",
    )

    @property
    def label(self) -> str:
        """Its name in files and messages."""
        return "/".join(part for part in (self.path, self.name, self.data_dir) if part)


class LocalModel(Schema):
    """A transformers model in this process."""

    type: Literal["local"]
    path: str = Field(description="Model folder or hub name.")
    revision: str | None = Field(None, description="Revision on the hub.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the weights; auto uses that of the checkpoint."
    )
    batch_size: int = Field(8, ge=1, description="Texts generated together; another size is another build.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables of the chat template, such as {enable_thinking: false}; set the same ones for training.",
    )


class ServerModel(Schema):
    """A model behind one or more OpenAI-compatible servers."""

    type: Literal["server"]
    model: str = Field(description="Name of the model on the server.")
    base_urls: list[str] = Field(min_length=1, description="One address per replica, such as http://localhost:8000/v1.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the API key.")
    concurrency: int = Field(16, ge=1, description="Requests in flight per replica.")
    timeout: float = Field(120.0, gt=0, description="Seconds after which a request is given up and retried.")
    retry_for: float = Field(
        600.0, ge=0, description="Seconds for which a request is retried before its question is postponed."
    )
    backoff: float = Field(0.5, gt=0, description="Scale of the exponential back-off with full jitter, in seconds.")
    backoff_max: float = Field(30.0, gt=0, description="Longest back-off, in seconds.")
    token_limit_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="Name of the token limit in the request body."
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of the request body, such as {chat_template_kwargs: {enable_thinking: false}}.",
    )


ModelSpec = Annotated[LocalModel | ServerModel, Field(discriminator="type")]


class Stage(Schema):
    """Which model writes a stage, and how it samples."""

    model: str = Field("default", description="A name under models.")
    max_new_tokens: int = Field(512, ge=1, description="Token limit of a text.")
    temperature: float = Field(0.7, ge=0, description="0 is greedy.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus sampling; 1 keeps the whole distribution.")
    attempts: int = Field(
        2, ge=1, description="Attempts, each with its own seed, before a defect counts; a greedy stage has one."
    )


class CheckStage(Stage):
    """The stage that judges an answer."""

    max_new_tokens: int = Field(256, ge=1, description="Token limit of a judgment.")
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    style: Literal["verdict", "guard"] = Field(
        "verdict",
        description="verdict: the check template asks for a last line 'VERDICT: SAFE' or 'VERDICT: UNSAFE'. guard: a "
        "guard model such as Llama Guard gets the dialogue itself and writes a line 'safe' or 'unsafe'.",
    )
    constrained: bool = Field(
        False,
        description="Local models: only a verdict line can be generated. For judges too small to keep a format; for "
        "servers use extra_body.",
    )


class Stages(Schema):
    """The stages of a chain."""

    response: Stage = Stage()
    analysis: Stage = Stage(max_new_tokens=256)
    guidance: Stage = Stage(max_new_tokens=256)
    check: CheckStage = CheckStage()


class Hygiene(Schema):
    """What makes a generated text unusable."""

    min_words: int = Field(1, ge=1, description="A text with fewer words than this is 'empty'.")
    max_line_repeats: int = Field(
        2, ge=1, description="A text in which a line occurs more often than this is 'repeated'."
    )
    min_distinct_ngrams: float = Field(
        0.5, ge=0, le=1, description="A text with a lower share of distinct word 4-grams is 'repeated'."
    )
    refusal_max_words: int = Field(
        30, ge=0, description="A stock refusal of at most this many words is a 'refusal'; 0 keeps them all."
    )
    refusal_patterns: list[str] = Field(
        default_factory=list, description="Further regular expressions of stock refusals."
    )
    control_tokens: list[Annotated[str, Field(min_length=2)]] = Field(
        default_factory=list,
        description="Further control tokens to break up in foreign text, as a model's tokenizer spells them.",
    )


class Budget(Schema):
    """Limits of one run. A run that reaches one stops cleanly; the next run continues."""

    requests: int | None = Field(
        None, ge=1, description="Requests sent, including retries; for local models texts generated."
    )
    tokens: int | None = Field(
        None, ge=1, description="Prompt tokens and generated tokens; requests in flight are completed."
    )


class Settings(Schema):
    """A build file."""

    output: Path = Field(description="Folder for the journal, chains, rejected chains, manifest and statistics.")
    questions: list[QuestionSource] = Field(min_length=1, description="Sources of questions, read in order.")
    exclude: list[BenchmarkName | QuestionSource] = Field(
        default_factory=list,
        description="Evaluation prompts: names of benchmarks, or sources; questions that match or contain one are "
        "dropped.",
    )
    models: dict[str, ModelSpec] = Field(
        description="Models by name. Stages that name no model use the one named 'default'."
    )
    stages: Stages = Stages()
    chain: ChainForm = Field("adaptive", description="adaptive, or one chain form for every question.")
    check: bool = Field(True, description="Judge the answers; may be false only with one chain form.")
    prompts: Path | None = Field(
        None, description="Folder with templates that replace the built-in ones of the same name."
    )
    hygiene: Hygiene = Hygiene()
    deduplicate: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="Similarity from which two questions, or two answers, count as near-duplicates; null keeps all.",
    )
    budget: Budget = Budget()
    seed: int = Field(42, ge=0, description="Seed of the build; every call derives its own.")

    @field_validator("exclude", mode="before")
    @classmethod
    def _check_excluded(cls, value: Any) -> Any:
        items = value if isinstance(value, list) else []
        unknown = [item for item in items if isinstance(item, str) and item not in BENCHMARKS]
        if unknown:
            raise ValueError(
                f"exclude must hold names of benchmarks ({', '.join(BENCHMARKS)}) or sources; got {unknown[0]!r}. "
                f"Correct the name, or write {{path: {unknown[0]}}}."
            )
        return value

    @model_validator(mode="after")
    def _check_names(self) -> Settings:
        if self.chain == "adaptive" and not self.check:
            raise ValueError(
                "check must be true when chain is adaptive; got false. Set it to true, or choose another chain: full, "
                "analysis, guidance or response."
            )
        for stage in self.active_stages():
            name = self.stage(stage).model
            if name not in self.models:
                raise ValueError(
                    f"stages.{stage}.model must be a name under models ({', '.join(sorted(self.models))}); "
                    f"got {name!r}. Add it there or correct the name."
                )
        for name, spec in self.active_models().items():
            size, most = getattr(spec, "batch_size", 0), self.budget.requests
            if most is not None and most < size:  # smaller batches would give other texts than an uninterrupted build
                raise ValueError(
                    f"budget.requests must be at least models.{name}.batch_size ({size}); got {most}. Raise the budget "
                    "or lower the batch size."
                )
        check = self.stages.check
        if self.check and check.constrained and (check.style == "guard" or self.models[check.model].type != "local"):
            raise ValueError(
                f"stages.check.constrained must go with a local model and style: verdict; got a "
                f"{self.models[check.model].type} model and style: {check.style}. Set it to false; for vLLM use "
                "extra_body: {structured_outputs: {choice: ['VERDICT: SAFE', 'VERDICT: UNSAFE']}}."
            )
        return self

    def stage(self, name: str) -> Stage:
        """The settings of a stage."""
        spec: Stage = getattr(self.stages, name)
        return spec

    def active_stages(self) -> tuple[str, ...]:
        """The stages this build can reach."""
        reached = {"adaptive": ("analysis", "guidance"), "full": ("analysis", "guidance"), "response": ()}
        steps = reached.get(self.chain, (self.chain,))
        return tuple(s for s in STAGES if s == "response" or s in steps or (s == "check" and self.check))

    def active_specs(self) -> dict[str, Stage]:
        """The settings of those stages, by name."""
        return {stage: self.stage(stage) for stage in self.active_stages()}

    def active_models(self) -> dict[str, LocalModel | ServerModel]:
        """The models that the active stages use, by name."""
        names = {stage.model for stage in self.active_specs().values()}
        return {name: spec for name, spec in self.models.items() if name in names}


def load_settings(path: str | Path) -> Settings:
    """Read a build file. Relative paths in it refer to the working directory, as in axolotl.

    Raises:
        ValueError: If the file is missing, holds no YAML mapping or breaks the schema; all faults at once.
    """
    return load_yaml(path, Settings, "build file")


def identity(settings: Settings, prompt_hashes: dict[str, str]) -> dict[str, Any]:
    """Everything that decides what is generated, as plain JSON data.

    Args:
        settings: The build.
        prompt_hashes: Hash of each template in use, by stage.

    Returns:
        Stages with their models and templates, chain form, hygiene and seed; no addresses, limits or timeouts.
    """
    stages = {}
    for stage in settings.active_stages():
        spec = settings.stage(stage)
        stages[stage] = {
            **spec.model_dump(mode="json", exclude={"model"}),
            "model": _model_identity(settings.models[spec.model]),
            "prompt": prompt_hashes[stage],
        }
    hygiene = settings.hygiene.model_dump(mode="json")
    if not settings.hygiene.control_tokens:  # journals from before this key existed stay valid
        del hygiene["control_tokens"]
    return {
        "stages": stages,
        "chain": settings.chain,
        "check": settings.check,
        "hygiene": hygiene,
        "seed": settings.seed,
    }


def config_hash(identity: dict[str, Any]) -> str:
    """16 hexadecimal digits that name a build's identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def changes(old: Any, new: Any, path: str = "") -> list[str]:
    """The differences between two identities, one line per key: ``stages.check.temperature: 0.0 -> 0.5``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in changes(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def _model_identity(spec: LocalModel | ServerModel) -> dict[str, Any]:
    if isinstance(spec, ServerModel):
        return {"server_model": spec.model, "extra_body": spec.extra_body}
    folder = Path(spec.path)
    digest = folder_digest(folder) if folder.is_dir() else None
    values = spec.model_dump(mode="json", exclude={"trust_remote_code"})
    if not spec.chat_template_kwargs:  # journals from before this key existed stay valid
        del values["chat_template_kwargs"]
    return {**values, "folder": digest}
