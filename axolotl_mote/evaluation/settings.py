"""The evaluation file: its schema, how it is read, and the hash that tells two sets of answers apart.

Keys that change what is asked or how it is answered are part of the hash of a cell (one system, one mode, one task).
Keys that only say how fast or from where (addresses, concurrency, batch size, timeouts) are not, so they may change
between two runs. The grader has a hash of its own: another grader judges again and generates nothing.
No model and no inspect_ai is imported here.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from axolotl_mote.chain.steps import ADAPTIVE
from axolotl_mote.files import folder_digest
from axolotl_mote.schema import Schema, load_yaml

TASKS = ("xstest", "strongreject", "coconot", "hh_rlhf", "custom")
"""The project's tasks. Those of other packages run with ``inspect eval``."""

NO_STEPS = "plain"
"""The mode of a system without steps."""

_OPTIONS = {
    "subset": ("xstest",),
    "transforms": ("strongreject", "custom"),
    "metrics": ("hh_rlhf",),
    "data_dir": ("hh_rlhf",),
    "scorers": ("custom",),
}
"""Options of a task -> the tasks that have them."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class Endpoint(Schema):
    """A model: an adapter, a model folder, or a model behind a server."""

    adapter: Path | None = Field(None, description="Output folder of training: a MoTE adapter, or a LoRA on chains.")
    model: str | None = Field(
        None, description="Folder or hub name of a model without adapter; with server, its name on the server."
    )
    server: str | None = Field(
        None, description="Address of a server with an OpenAI-compatible API, such as http://localhost:8000/v1."
    )
    inspect_model: str | None = Field(
        None, description="A model by the name that inspect_ai gives it, such as mockllm/model."
    )
    base_model: str | None = Field(
        None, description="Base model of the adapter; default: the one in adapter_config.json."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the weights; auto uses that of the checkpoint."
    )
    device: str | None = Field(None, description="Such as cpu or cuda:0; default: the first GPU, else the CPU.")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Environment variable that holds the server's API key."
    )
    concurrency: int = Field(16, ge=1, description="Requests in flight; of servers and of inspect_model.")
    retry_for: int = Field(
        300, ge=1, description="Seconds for which a request to a server is retried before it counts as failed."
    )
    extra_body: dict[str, Any] = Field(default_factory=dict, description="Further fields of a server's request body.")

    @model_validator(mode="after")
    def _check_kind(self) -> Endpoint:
        given = [key for key in ("adapter", "model", "inspect_model") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(
                f"a system must have one of adapter, model and inspect_model; got {' and '.join(given) or 'none'}. "
                "Give one; a server takes the model's name on it."
            )
        if self.server and not self.model:
            raise ValueError(f"server must go with model; got {given[0]}. Give the model's name on the server.")
        for key, allowed in (("base_model", self.adapter), ("api_key_env", self.server), ("extra_body", self.server)):
            if getattr(self, key) and not allowed:
                needs = "adapter" if key == "base_model" else "server"
                raise ValueError(f"{key} must go with {needs}; got none. Add {needs} or remove {key}.")
        if self.server and not self.server.startswith(("http://", "https://")):
            raise ValueError(
                f"server must begin with http:// or https://; got {self.server!r}. Write the whole address."
            )
        if self.server and (fault := _address_fault(self.server)):
            raise ValueError(f"server must be an address such as http://localhost:8000/v1; got {fault}. Correct it.")
        if self.server and re.match(r"https?://[^/]*@", self.server):
            raise ValueError("server must not hold a password; got one. Put the key into api_key_env's variable.")
        return self

    @property
    def is_local(self) -> bool:
        """Whether it is loaded into this process."""
        return self.server is None and self.inspect_model is None

    @property
    def label(self) -> str:
        """What it is, for tables: folder or name, and server."""
        name = str(self.adapter or self.model or self.inspect_model)
        return f"{name} at {self.server}" if self.server else name


class System(Endpoint):
    """A system to measure."""

    name: str = Field(pattern=f"^{_NAME}$", description="Its name in tables and plots; letters, digits, '.', '_', '-'.")
    steps: list[str] = Field(
        default_factory=list,
        description="Modes of an adapter, each measured by itself: adaptive, verify, or a chain form such as "
        "analysis+response; default: adaptive.",
    )
    check: bool = Field(False, description="Let the adapter's trained check step judge every answer.")

    @model_validator(mode="after")
    def _check_steps(self) -> System:
        for key in ("steps", "check"):
            if getattr(self, key) and not self.adapter:
                raise ValueError(f"{key} must go with adapter; got none. Remove {key}: only adapters have steps.")
        if doubled := sorted({mode for mode in self.steps if self.steps.count(mode) > 1}):
            raise ValueError(f"steps must name every mode once; got {doubled[0]} twice. Remove one.")
        return self

    @property
    def modes(self) -> list[str]:
        """What is measured, one after another."""
        return (self.steps or [ADAPTIVE]) if self.adapter else [NO_STEPS]


class TaskSpec(Schema):
    """A task: a benchmark and how it is used."""

    name: Literal["xstest", "strongreject", "coconot", "hh_rlhf", "custom"] = Field(
        description="A benchmark, or custom for prompts of your own."
    )
    label: str = Field("", pattern=f"^({_NAME})?$", description="Its name in tables; needed where a task occurs twice.")
    path: str | None = Field(
        None,
        description="Data file, hub, or Hugging Face name of the whole benchmark; default: the prompts that come with "
        "the package. custom: your file.",
    )
    subset: Literal["all", "safe", "unsafe"] | None = Field(None, description="xstest: part of the prompts.")
    data_dir: str | None = Field(None, description="hh_rlhf: folder inside a data set of the hub.")
    transforms: list[str] = Field(
        default_factory=list, description="strongreject, custom: attacks; none asks plainly, all takes every one."
    )
    metrics: list[str] = Field(default_factory=list, description="hh_rlhf: harm, help, harm_help; default: harm.")
    scorers: list[str] = Field(
        default_factory=list,
        description="custom: refusal, harm, help, harm_help, strongreject, match; default: match if every row has a "
        "target, else refusal.",
    )
    judge_chain: bool = Field(False, description="Judge all steps as well, and report both figures.")
    limit: int | None = Field(None, ge=1, description="Use this many prompts, always the same ones.")

    @model_validator(mode="after")
    def _check_options(self) -> TaskSpec:
        for key, names in _OPTIONS.items():
            if getattr(self, key) and self.name not in names:
                raise ValueError(f"{key} must go with {' or '.join(names)}; got {self.name}. Remove it.")
        if self.name == "custom" and not self.path:
            raise ValueError("path must be given for custom; got none. Name your file of prompts.")
        return self

    @property
    def title(self) -> str:
        """Its name in tables and files."""
        return self.label or self.name

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the task; what is not set is left out."""
        return {key: value for key, value in self.model_dump(exclude={"name", "label"}).items() if value}


class Sampling(Schema):
    """How answers are sampled."""

    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 keeps the whole distribution.")
    seed: int = Field(0, ge=0, description="Seed of sampling and of the intervals; servers get it if epochs is 1.")


def _task(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Settings(Schema):
    """An evaluation file."""

    output: Path = Field(description="Folder for logs, results.jsonl, summary.json and report.html.")
    systems: list[System] = Field(min_length=1, description="Systems to measure, one after another.")
    tasks: list[Annotated[TaskSpec, BeforeValidator(_task)]] = Field(
        min_length=1, description="Tasks; a name alone, or a mapping with name."
    )
    grader: Endpoint | None = Field(
        None,
        description="Model of the LLM judges. Without it, what only they can judge is answered and stays unscored.",
    )
    max_new_tokens: int = Field(1024, ge=1, description="Token limit of an answer, reasoning included.")
    sampling: Sampling = Sampling()
    epochs: int = Field(1, ge=1, description="Answers to every prompt; more than 1 needs a temperature above 0.")
    batch_size: int = Field(16, ge=1, description="Prompts that a local model answers together.")

    @model_validator(mode="after")
    def _check_names(self) -> Settings:
        for key, names in (("systems", [s.name for s in self.systems]), ("tasks", [t.title for t in self.tasks])):
            folded = [name.casefold() for name in names]  # they are folders, on any file system
            if doubled := [name for name in names if folded.count(name.casefold()) > 1]:
                word = "name" if key == "systems" else "label"
                raise ValueError(f"{key} must have names of their own; got {doubled[0]} twice. Change one {word}.")
        if self.epochs > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"epochs must be 1 when sampling.temperature is 0; got {self.epochs}. Greedy answers do not vary: "
                "raise the temperature."
            )
        return self

    def key_variables(self) -> list[str]:
        """Environment variables that hold API keys."""
        endpoints: list[Endpoint] = [*self.systems, *([self.grader] if self.grader else [])]
        return sorted({e.api_key_env for e in endpoints if e.api_key_env})


def _address_fault(address: str) -> str | None:
    """Why an address cannot be used; None if it can. The address itself may hold a password and is not repeated."""
    if re.search(r"[\s\x00-\x1f\x7f]", address):
        return "one with spaces or control characters"
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        return f"one that cannot be read ({error})"
    return None if parts.hostname else "one without a host"


def load_settings(path: str | Path) -> Settings:
    """Read an evaluation file. Relative paths in it refer to the working directory, as in axolotl.

    Raises:
        ValueError: If the file is missing, holds no YAML mapping or breaks the schema; all faults at once.
    """
    return load_yaml(path, Settings, "evaluation file")


def endpoint_identity(endpoint: Endpoint) -> dict[str, Any]:
    """What decides how a model answers: names, and digests of folders; no addresses and no keys."""
    if endpoint.inspect_model:
        return {"inspect_model": endpoint.inspect_model}
    if endpoint.server:
        return {"server_model": endpoint.model, "extra_body": endpoint.extra_body}
    if endpoint.adapter is None:
        return {"model": _folder_or_name(str(endpoint.model)), "dtype": endpoint.dtype}
    base = endpoint.base_model or _recorded_base(endpoint.adapter)
    return {
        "adapter": folder_digest(endpoint.adapter) if endpoint.adapter.is_dir() else None,
        "base_model": _folder_or_name(base) if base else None,
        "dtype": endpoint.dtype,
    }


def answer_identity(
    settings: Settings, system: System, mode: str, task: TaskSpec, data: dict[str, Any], endpoint: dict[str, Any]
) -> dict[str, Any]:
    """Everything that decides the answers of a cell, as plain JSON data.

    Args:
        settings, system, mode, task: The cell.
        data: What identifies the task's prompts: its version and their checksum. Who judges the answers is not part.
        endpoint: ``endpoint_identity`` of the system; reading a folder takes a moment, so it is passed in.
    """
    return {
        "system": endpoint,
        "steps": mode,
        "check": system.check,
        "task": {"name": task.name, "transforms": task.transforms, **data},
        "max_new_tokens": settings.max_new_tokens,
        "sampling": settings.sampling.model_dump(mode="json") if settings.sampling.temperature else "greedy",
        "epochs": settings.epochs,
    }


def identity_hash(identity: dict[str, Any]) -> str:
    """12 hexadecimal digits that name an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _folder_or_name(name: str) -> dict[str, Any]:
    folder = Path(name)
    return {"folder": folder_digest(folder)} if folder.is_dir() else {"name": name}


def _recorded_base(adapter: Path) -> str | None:
    try:
        values = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # loading the adapter reports it
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    return base if isinstance(base, str) else None
