"""What docs/ says is what the code says, and its links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
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


@pytest.mark.parametrize("name", ["configuration.md", "build-reference.md"])
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


# --- statements about the code --------------------------------------------------------------------------------------


def test_the_names_that_how_it_works_points_to_exist() -> None:
    text = text_of(DOCS / "how-it-works.md")
    rows = re.findall(r"^\| [^|]+ \| \[[^]]+\]\(([^)]+)\) \| ([^|]*) \|$", text, re.MULTILINE)
    named = [(DOCS / file, name) for file, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(named) > 8
    defined = {file: re.findall(r"(?m)^(?:def |class )?(\w+)\b", file.read_text(encoding="utf-8")) for file, _ in named}
    assert [f"{file.name}: {name}" for file, name in named if name not in defined[file]] == []


def message_patterns() -> list[re.Pattern[str]]:
    """Every string of the package with at least 20 characters of its own; placeholders stand for any text."""
    patterns = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            literal = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if sum(map(len, literal)) >= 20:
                pieces = (re.escape(p.value) if isinstance(p, ast.Constant) else "(?s:.*)" for p in parts)
                patterns.append(re.compile("".join(pieces)))
    return patterns


def test_messages_in_the_faq_are_those_of_the_code() -> None:
    patterns = [*message_patterns(), re.compile(re.escape("Error: No such command 'mote'."))]  # the last one is click's

    def known(text: str) -> bool:
        """Whether the code can write it, alone or after a row number."""
        return any(p.fullmatch(text) or p.fullmatch(re.sub(r"^row \d+: ", "", text)) for p in patterns)

    blocks = re.findall(r"(?ms)^```text\n(.*?)\n```", text_of(DOCS / "faq.md"))
    messages = [message for block in blocks for message in ([block] if known(block) else block.splitlines())]
    assert [message for message in messages if not known(message)] == []


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
]  # fmt: skip
"""Identifiers that were replaced by the field's words."""

REPLACED_PHRASES = [
    r"what could not be honou?red", r"knows nothing", r"tokens? meets?", r"meets? the gate", r"steps? (is|are) hidden",
    r"hid(es|ing|den) (a |the )?steps?", r"skipped steps?", r"laid over",
]  # fmt: skip
"""Phrases of our own where the field has a word: tokens are routed to an expert; a step is dropped."""

SOURCES = sorted(
    file
    for pattern in ("axolotl_mote/**/*.py", "axolotl_mote/**/*.jinja", "docs/*.*", "*.md", "example_configs/**/*.yml")
    for file in REPO.glob(pattern)
)


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
