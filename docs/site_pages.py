"""MkDocs hook: makes a page of everything that docs/ links to outside of itself, and of the notebook.

On a forge, `../example_configs/quickstart.yml` leads to the file. The site has a page `files/...` with the file's text
instead, so it needs neither the repository nor the network. Imports mkdocs only.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".json": "json", ".jsonl": "json", ".cff": "yaml"}

_origins: dict[str, Path] = {}
"""Folder that the links of each generated page are relative to, by the page's address."""


def uri_of(path: Path) -> str:
    """Address of a file's page in the site: a page of docs/, or the generated one."""
    if path.is_relative_to(DOCS):
        inside = path.relative_to(DOCS).as_posix()
        return inside.removesuffix(".ipynb") + ".md" if path.suffix == ".ipynb" else inside
    outside = path.relative_to(ROOT).as_posix()
    return f"files/{outside.removesuffix('.md')}.md"


def targets(markdown: str, folder: Path) -> list[Path]:
    """Existing files and folders of the repository that a page links to."""
    found = [(folder / target).resolve() for target in LINK.findall(markdown) if "://" not in target]
    return [path for path in found if path.exists() and path.is_relative_to(ROOT)]


def children(folder: Path) -> list[Path]:
    """Files and folders to list, without hidden ones and bytecode."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__pycache__")))


def page_of(path: Path) -> str:
    """Markdown that shows a file or lists a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        lines = [f"- [{one.name}]({one.name}){_about(one)}" for one in children(path)]
        return "\n".join([f"# `{name}/`", "", *lines, ""])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# `{name}`\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n````\n"


def _about(path: Path) -> str:
    """What a file's first comment says about it."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0] if path.is_file() else ""
    return f": {first[2:]}" if first.startswith("# ") and path.suffix != ".md" else ""


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: text, code, and the outputs as they were saved."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [part for output in cell.get("outputs", []) if (part := _output(output))]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "text/html" in data:
        return re.sub(r"\n\s*\n", "\n", "".join(data["text/html"])).strip()
    if "image/png" in data:
        return f'<img alt="output" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    text = "".join(data.get("text/plain", "")).rstrip()
    return f"```text\n{text}\n```" if text else ""


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages: first the notebook, then whatever any page links to."""
    _origins.clear()
    queue = [(page.read_text(encoding="utf-8"), DOCS) for page in DOCS.glob("*.md")]
    for notebook in DOCS.glob("*.ipynb"):
        markdown = notebook_page(notebook)
        files.append(File.generated(config, uri_of(notebook), content=markdown))
        queue.append((markdown, DOCS))
    while queue:
        markdown, folder = queue.pop()
        for path in targets(markdown, folder):
            uri = uri_of(path)
            if path.is_relative_to(DOCS) or uri in _origins:
                continue
            content = page_of(path)
            _origins[uri] = path if path.is_dir() else path.parent
            files.append(File.generated(config, uri, content=content))
            queue.append((content, _origins[uri]))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead the links of a page to the pages of the site."""
    own = page.file.src_uri
    folder = _origins.get(own, (DOCS / own).parent)

    def rewrite(link: re.Match[str]) -> str:
        path = (folder / link.group()).resolve()
        if "://" in link.group() or not path.exists() or not path.is_relative_to(ROOT):
            return link.group()
        return posixpath.relpath(uri_of(path), posixpath.dirname(own))

    return LINK.sub(rewrite, markdown)
