"""The documentation: every link between pages leads somewhere, and the site builds without a warning or the network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.line_counts import ROOT

NEEDED = ("mkdocs", "material", "mkdocstrings_handlers")
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("*/README.md")]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Refuses every connection, then builds: what the build loaded from elsewhere would end it.
OFFLINE = """
import socket, sys
def refuse(*_): raise OSError("the build used the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--site-dir", sys.argv[1]])
"""


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site make of the headings of ``page``."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Links in ``text``, the content of ``page``, to files or headings that do not exist. Code and addresses on the web are
    not looked at."""
    wrong = []
    for link in LINK.findall(re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if "://" in link or link.startswith("mailto:"):
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            wrong.append(f"{page.relative_to(ROOT)}: {link}")
    return wrong


def test_links_lead_somewhere() -> None:
    assert len(PAGES) > 25
    assert not [wrong for page in PAGES for wrong in broken_links(page, page.read_text())]


def test_every_block_of_code_is_closed() -> None:
    fences = {page: len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)) for page in PAGES}
    assert sum(fences.values()) > 100
    assert not [page for page, count in fences.items() if count % 2]


def test_a_broken_link_is_found() -> None:
    text = (
        "[a](tutorial.md) [b](nowhere.md) [c](glossary.md#none) [d](#tinytron) `[e](code.md)`\n```\n[f](code.md)\n```\n"
    )
    wrong = [f"docs/index.md: {link}" for link in ("nowhere.md", "glossary.md#none")]
    assert broken_links(ROOT / "docs" / "index.md", text) == wrong


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed: pip install -c constraints.txt -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-c", OFFLINE, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_strictly_and_offline(site: Path) -> None:
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert {"index.html", "reference/flags.html", "reference/api.html", "examples/index.html"} <= pages
    assert 'class="mermaid"' in (site / "ways.html").read_text()
    assert "must divide --num_attention_heads" in (site / "reference" / "errors.html").read_text()
    assert "train_step" in (site / "reference" / "api.html").read_text()


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]+src=[\"']?(https?:[^\"' >]+)|<link[^>]+stylesheet[^>]+(https?:[^\"' >]+)"
    )
    found = {str(path): loaded.findall(path.read_text()) for path in site.rglob("*.html")}
    assert not {name: urls for name, urls in found.items() if urls}
