"""What docs/ says is what the code says, and its links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
DOCS = REPO / "docs"
PACKAGE = REPO / "axolotl_mote"
PAGES = sorted(
    page
    for pattern in ("*.md", ".github/**/*.md", "docs/*.md", "docs/*.ipynb", "example_configs/**/*.md")
    for page in REPO.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(page: Path) -> str:
    """A page's Markdown; of a notebook, that of its text cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


# --- generated files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["configuration.md", "build-reference.md", "evaluation-reference.md"])
def test_references_are_current(name: str, generator: ModuleType) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == generator.PAGES[name](), "run `make docs`"


def test_picture_is_current(generator: ModuleType) -> None:
    written = (DOCS / "images" / "how-it-works.svg").read_text(encoding="utf-8")
    assert written == generator.draw.draw(), "run `make docs`"


def test_the_notebook_was_executed_and_names_no_machine() -> None:
    text = (DOCS / "tutorial.ipynb").read_text(encoding="utf-8")
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run `make tutorial`"
    assert "image/png" in text
    assert re.findall(r"/(?:home|root|tmp|work|Users)/\S*", text) == []


# --- links ----------------------------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """Anchors of a page's headings, as forges and MkDocs build them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", text_of(page)), re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s", "-", slug) for slug in slugs} | {re.sub(r"[\s-]+", "-", slug) for slug in slugs}


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(text_of(page)):
        target, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors_of(file)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def names_in(nav: Any) -> Iterator[str]:
    """Pages of a navigation, whatever their depth."""
    if isinstance(nav, str):
        yield nav
    for child in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from names_in(child)


def test_every_page_is_in_the_navigation_and_in_the_index() -> None:
    config = yaml.safe_load((REPO / ".mkdocs.yml").read_text(encoding="utf-8"))
    in_site = {name for name in names_in(config["nav"]) if not name.startswith("files/")}
    pages = {page.name for page in [*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")]}
    assert in_site == {name.replace(".ipynb", ".md") for name in pages}
    assert pages - {"README.md"} <= set(LINK.findall(text_of(DOCS / "README.md")))


# --- citation -------------------------------------------------------------------------------------------------------


def bibtex_of(file: Path) -> dict[str, str]:
    """The fields of a file's BibTeX entry without braces and line breaks, and its key."""
    (entry,) = re.findall(r"(?ms)^@inproceedings\{(.*?)^\}", file.read_text(encoding="utf-8"))
    fields = dict(re.findall(r"(?s)(\w+)\s*=\s*\{(.*?)\},?\n(?=\s*\w+\s*=|\Z)", entry))
    plain = {name: " ".join(value.replace("{", "").replace("}", "").split()) for name, value in fields.items()}
    return plain | {"key": entry.split(",")[0]}


@pytest.mark.parametrize("file", ["README.md", "axolotl_mote/training/card.py"])
def test_the_paper_is_cited_alike_everywhere(file: str) -> None:
    cff = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in cff["authors"])
    assert bibtex_of(REPO / file) == {
        "key": "liu-etal-2025-mixture",  # the ACL Anthology's
        "title": cff["title"],
        "author": authors,
        "booktitle": cff["collection-title"],
        "year": str(cff["year"]),
        "pages": f"{cff['start']}--{cff['end']}",
        "doi": cff["doi"],
        "url": cff["url"],
    }


# --- statements about the code --------------------------------------------------------------------------------------


def test_the_names_that_how_it_works_points_to_exist() -> None:
    text = text_of(DOCS / "how-it-works.md")
    rows = re.findall(r"^\| [^|]+ \| \[[^]]+\]\(([^)]+)\) \| ([^|]*) \|$", text, re.MULTILINE)
    named = [(DOCS / file, name) for file, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(named) > 8
    defined = {file: re.findall(r"(?m)^(?:def |class )?(\w+)\b", file.read_text(encoding="utf-8")) for file, _ in named}
    assert [f"{file.name}: {name}" for file, name in named if name not in defined[file]] == []


def message_patterns() -> Iterator[re.Pattern[str]]:
    """Every string of the package with at least 20 characters of its own.

    A placeholder stands for text within its line; one that has a line for itself stands for any lines.
    """
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(
                part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else PLACEHOLDER
                for part in parts
            )
            text = re.sub(r"\{\w+\}", PLACEHOLDER, text)  # templates that are filled in elsewhere
            if len(text.replace(PLACEHOLDER, "")) >= 20:
                lines = (
                    "(?s:.+)" if line == PLACEHOLDER else ".*".join(map(re.escape, line.split(PLACEHOLDER)))
                    for line in text.split("\n")
                )
                yield re.compile("\n".join(lines))


PLACEHOLDER = "\0"


def unknown_messages(block: str, patterns: Sequence[re.Pattern[str]]) -> list[str]:
    """Lines of a block that the code cannot write, alone, after a row number, or as one message of several lines."""
    if "\n" in block and any(pattern.fullmatch(block) for pattern in patterns):
        return []

    def known(line: str) -> bool:
        return any(p.fullmatch(line) or p.fullmatch(re.sub(r"^ *row \d+: ", "", line)) for p in patterns)

    return [line for line in block.splitlines() if not known(line)]


def messages_of(page: str) -> list[str]:
    return re.findall(r"(?ms)^```text\n(.*?)\n```", text_of(DOCS / page))


@pytest.mark.parametrize("page", ["faq.md", "getting-started.md"])
def test_messages_in_the_docs_are_those_of_the_code(page: str) -> None:
    patterns = [*message_patterns(), re.compile(re.escape("Error: No such command 'mote'."))]  # the last one is click's
    assert [line for block in messages_of(page) for line in unknown_messages(block, patterns)] == []


def test_no_stale_line_hides_in_a_block_of_the_faq() -> None:
    """A changed line fails wherever it stands in its block."""
    patterns = list(message_patterns())
    blocks = [block for block in messages_of("faq.md") if "\n" in block]
    assert len(blocks) > 5
    for block in blocks:
        lines = block.splitlines()
        for at in (0, len(lines) - 1):
            changed = [*lines]
            changed[at] = "stale " + changed[at].replace(";", " -", 1)
            assert unknown_messages("\n".join(changed), patterns), changed


def test_axolotl_accepts_the_configuration_before_and_after_the_migration() -> None:
    pytest.importorskip("axolotl")
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    capabilities = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
    (diff,) = re.findall(r"(?ms)^```diff\n(.*?)^```", text_of(DOCS / "migrate.md"))
    for kept, adapter in ((" -", "lora"), (" +", "mote")):
        cfg = DictDefault(yaml.safe_load("\n".join(line[1:] for line in diff.splitlines() if line[0] in kept)))
        prepare_plugins(cfg)
        valid = validate_config(cfg, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})
        assert valid.adapter == adapter


REPLACED = [
    "ServersSilent", "Exam", "Growth", "dearest", "rests_until", "let_cpu_processes_meet", "hideable_steps",
    "_true_rows", "mote_skip", "dense_mask", "flex_mask", "varlen_segments", "axolotl_mote.noise",
    "axolotl_mote.host", "axolotl_mote.digest", "host.py", "noise.py", "digest.py", "grow_chain", "CallPutOff",
    "step_vocabulary", "parse_chain", "generation.jsonl",
]  # fmt: skip
"""Identifiers that were replaced by the field's words."""

REPLACED_PHRASES = [
    r"what could not be honou?red", r"knows nothing", r"tokens? meets?", r"meets? the gate", r"steps? (is|are) hidden",
    r"hid(es|ing|den) (a |the )?steps?", r"skipped steps?", r"laid over",
]  # fmt: skip
"""Phrases of our own where the field has a word: tokens are routed to an expert; a step is dropped."""

TEXT = {
    "", ".cff", ".css", ".ipynb", ".jinja", ".json", ".md", ".py", ".slurm", ".svg", ".toml", ".yaml", ".yml",
}  # fmt: skip
"""File endings of what people wrote; data sets (.jsonl) and pictures hold words of others."""

ROOTS = (".ci", ".github", "axolotl_mote", "docs", "example_configs", "tests")
EXCEPTIONS = {
    REPO / "CHANGELOG.md",  # names what was replaced
    REPO / "tests" / "test_docs.py",  # lists it
}
SOURCES = sorted(
    file
    for file in (*REPO.glob("*"), *(file for root in ROOTS for file in (REPO / root).rglob("*")))
    if file.is_file() and file.suffix in TEXT and "__pycache__" not in file.parts and file not in EXCEPTIONS
)
SOURCES += sorted(file for file in REPO.glob(".*") if file.is_file() and file.suffix in TEXT)


def test_every_kind_of_file_is_searched() -> None:
    searched = {file.relative_to(REPO).as_posix() for file in SOURCES}
    assert {
        "Makefile", "README.md", "CITATION.cff", "pyproject.toml", ".mkdocs.yml", ".ci/run", ".github/CONTRIBUTING.md",
        ".github/workflows/ci.yml", "axolotl_mote/report.py", "docs/tutorial.ipynb", "docs/images/how-it-works.svg",
        "example_configs/multinode/train.slurm", "example_configs/data/README.md", "tests/test_layering.py",
    } <= searched  # fmt: skip


def found(pattern: str, flags: int = 0) -> list[str]:
    """Where a pattern occurs, as file and line."""
    return [
        f"{file.relative_to(REPO)}:{number}"
        for file in SOURCES
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line, flags)
    ]


@pytest.mark.parametrize("name", REPLACED)
def test_no_replaced_identifier_is_left(name: str) -> None:
    assert found(rf"(?<![\w]){re.escape(name)}(?![\w])") == []


@pytest.mark.parametrize("phrase", REPLACED_PHRASES)
def test_no_replaced_phrase_is_left(phrase: str) -> None:
    assert found(phrase, re.IGNORECASE) == []
