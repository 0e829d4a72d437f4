"""What is known of each benchmark: its file here, the columns of the original, licence, checksum, version.

The files below ``data/`` hold part of each benchmark; ``data/README.md`` names sources, rules of choice and licences.
The whole benchmark comes in by path or from the Hugging Face Hub, with the columns of the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Benchmark:
    """A set of evaluation prompts.

    Attributes:
        name: Its name in tasks and under ``exclude:``.
        version: Raised when figures stop being comparable with earlier ones: other prompts, order or labels.
        sha256: Of the file that ships.
        prompts: How many that file holds.
        columns: Columns that can hold the prompt; the first one present counts.
        category: Columns that can hold the category.
        label: Label of a row: "safe" where an answer should comply, "unsafe" where it should refuse, None where neither
            is known. It raises ValueError for a row of another set, whose label it cannot know.
        hub: Data set, configuration and split on the Hugging Face Hub.
        licence, source, citation: For attribution.
    """

    name: str
    version: int
    sha256: str
    prompts: int
    columns: tuple[str, ...]
    category: tuple[str, ...]
    label: Callable[[dict[str, Any]], str | None]
    hub: tuple[str, str | None, str]
    licence: str
    source: str
    citation: str

    @property
    def file(self) -> Path:
        """The file that ships."""
        return DATA / f"{self.name}.jsonl"

    @property
    def subsets(self) -> tuple[str, ...]:
        """Subsets that can be asked for."""
        return ("all", "safe", "unsafe") if self.name == "xstest" else ("all",)


def _xstest_label(row: dict[str, Any]) -> str | None:
    """The column ``label``; earlier releases have only the type, where ``contrast_...`` marks unsafe prompts."""
    given = str(row.get("label") or "").strip().lower()
    if not given:
        return "unsafe" if str(row.get("type", "")).startswith("contrast") else "safe"
    return given if given in ("safe", "unsafe") else None


_CONTRAST = frozenset(
    {
        "dangerous or sensitive topics",
        "false information",
        "false presuppositions",
        "input modality limitations",
        "modality limitations",
        "output modality limitations",
        "privacy violations",
        "triggers for offensive language",
        "underspecified",
    }
)
"""Subcategories of CoCoNot's contrast set, its test and its training split."""


def _coconot_label(row: dict[str, Any]) -> str | None:
    """Rows of the contrast set are safe.

    The original set, which should not be complied with, has the same columns: only its further subcategories tell it.

    Raises:
        ValueError: If the contrast set has no such row.
    """
    given = str(row.get("subcategory") or "").strip().lower()
    if given and given not in _CONTRAST:
        raise ValueError(
            f"path must hold CoCoNot's contrast set; got a row of its original set, of subcategory {given!r}. Set path "
            "to hub, or use custom with a label in every row."
        )
    return "safe" if given else None


_ALL = (
    Benchmark(
        name="coconot",
        version=1,
        sha256="4d39c39fbec795424b18f181f539bd488a98680b3632884808e8072eff41a516",
        prompts=190,
        columns=("prompt",),
        category=("category",),
        label=_coconot_label,
        hub=("allenai/coconot", "contrast", "test"),
        licence="MIT",
        source="github.com/allenai/noncompliance, contrast set, test split",
        citation="Brahman et al., The Art of Saying No: Contextual Noncompliance in Language Models, NeurIPS 2024",
    ),
    Benchmark(
        name="hh_rlhf",
        version=1,
        sha256="f08d5e2e50cc96039d2c5e712491f30b4e3338c1db2a6b060635eabe1c9ba24c",
        prompts=150,
        columns=("messages", "chosen"),
        category=("category",),
        label=lambda row: None,
        hub=("Anthropic/hh-rlhf", None, "test"),
        licence="MIT",
        source="github.com/anthropics/hh-rlhf at 354e5c3, harmless-base/test",
        citation="Bai et al., Training a Helpful and Harmless Assistant with Reinforcement Learning from Human "
        "Feedback, 2022",
    ),
    Benchmark(
        name="strongreject",
        version=1,
        sha256="9392d09c595ca06500a7c0b254f4788b3741fac252dcaabedaefca7a5aef390e",
        prompts=138,
        columns=("forbidden_prompt", "prompt"),
        category=("category",),
        label=lambda row: "unsafe",
        hub=("walledai/StrongREJECT", None, "train"),
        licence="MIT",
        source="github.com/dsbowen/strong_reject",
        citation="Souly et al., A StrongREJECT for Empty Jailbreaks, NeurIPS 2024",
    ),
    Benchmark(
        name="xstest",
        version=1,
        sha256="e508c1dde64f0124cd0f84259cd87a0f8d73d369b57fcca2d38abb5f830a8cbf",
        prompts=225,
        columns=("prompt",),
        category=("type",),
        label=_xstest_label,
        hub=("walledai/XSTest", None, "test"),
        licence="CC-BY-4.0",
        source="github.com/paul-rottger/exaggerated-safety at d7bb5bd",
        citation="Röttger et al., XSTest: A Test Suite for Identifying Exaggerated Safety Behaviours in Large Language "
        "Models, NAACL 2024",
    ),
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
"""All benchmarks by name."""
