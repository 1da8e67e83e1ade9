"""Hooks of mkdocs (mkdocs.yml): pages from outside docs/, the list of all error messages, and Mermaid without a network.

Links in docs/ are written for a checkout: ``../benchmarks/README.md`` is that file. Of the files outside docs/ those in
``OUTSIDE`` become pages of the site; a link to any other, such as a source file, becomes plain text, unless ``repo_url`` in
mkdocs.yml says where the repository can be read.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "examples/README.md", "tests/README.md")
RESULTS = "benchmarks"  # its README, and results/*.md with their pictures
MERMAID = "assets/mermaid.min.js"  # fetched by build.sh, not part of the repository
MESSAGES = "<!-- messages -->"
_LINK = re.compile(r"(!?)\[([^\[\]\n]*(?:\[[^\[\]\n]*\][^\[\]\n]*)*)\]\(([^)\s]+)\)")
# The theme fits a picture to the page's width: narrow boxes, close to each other, keep its letters readable.
_NARROW = """%%{init: {"flowchart": {"wrappingWidth": 110, "rankSpacing": 24, "nodeSpacing": 24, "padding": 8}}}%%"""
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Load Mermaid from the site itself if it is there; without it the theme loads it from unpkg.com."""
    if (Path(config.docs_dir) / MERMAID).exists():
        config.extra_javascript.append(MERMAID)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are outside docs/, under their paths in the repository."""
    found = [ROOT / name for name in OUTSIDE if name.endswith(".md") and name != "README.md"]
    found += [path for path in (ROOT / RESULTS).rglob("*") if path.suffix in (".md", ".png")]
    for path in sorted(found):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of a checkout into links of the site, and put in the list of errors."""
    source = Path(page.file.abs_src_path or page.file.src_uri).resolve()
    parts = _FENCE.split(markdown)
    for n, part in enumerate(parts):
        if n % 2 == 0:
            parts[n] = _LINK.sub(lambda match: _link(match, source, page, config, files), part)
        else:  # code
            parts[n] = part.replace("```mermaid\n", f"```mermaid\n{_NARROW}\n")
    text = "".join(parts)
    return text.replace(MESSAGES, all_messages()) if MESSAGES in text else text


def _link(match: re.Match[str], source: Path, page: Page, config: MkDocsConfig, files: Files) -> str:
    image, text, target = match.groups()
    path, _, anchor = target.partition("#")
    if not path or "://" in target or target.startswith("mailto:"):
        return match[0]
    found = (source.parent / path).resolve()
    if ROOT not in found.parents or not found.exists():
        return match[0]  # mkdocs reports it
    name = found.relative_to(ROOT).as_posix()
    uri = name.removeprefix("docs/") if name != "README.md" else "index.md"
    if files.get_file_from_path(uri) is not None:
        relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({relative}{'#' + anchor if anchor and name != 'README.md' else ''})"
    if config.repo_url:
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{name})"
    return text


def all_messages() -> str:
    """Every ``raise`` of a user's error in the library as a Markdown table per class, sorted by its text."""
    found: dict[str, set[tuple[str, str]]] = {}
    for path in sorted((ROOT / "tinytron").rglob("*.py")):
        for kind, text in _raised(ast.parse(path.read_text())):
            found.setdefault(kind, set()).add((text, path.relative_to(ROOT).as_posix()))
    lines = []
    for kind in sorted(found):
        lines += [f"### {kind}\n", "| message | raised in |", "|---|---|"]
        lines += [f"| {_cell(text)} | `{name}` |" for text, name in sorted(found[kind])]
        lines.append("")
    return "\n".join(lines)


def _raised(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Class and text of every ``raise SomeError(text)`` whose text is written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            text = _text(node.exc.args[0]) if node.exc.args else ""
            if node.exc.func.id in USER_ERRORS and re.search(r"\w{3}", text):
                yield node.exc.func.id, text


USER_ERRORS = ("ConfigError", "DataError", "CheckpointError", "StorageError", "TrainingError")


def _text(node: ast.expr) -> str:
    """The literal text of an expression; ``…`` for what is known at run time only."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def _cell(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text.replace("\n", " "))
    return re.sub("…+", "…", escaped)
