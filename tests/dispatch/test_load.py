"""Modules and files of ``--load``: what was checked here is found on the host, or refused before anything is sent."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.dispatch.conftest import Place, git
from tests.dispatch.test_submit import Said, _until, _write, said  # noqa: F401
from tests.jobs.conftest import MODULE
from tinytron.registry import load_module

MODULES = ("nested_jobs", "package_of_jobs", "package_of_jobs.more")


@pytest.fixture
def below(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a folder of the repository with a module and a package, which are committed."""
    folder = repository / "a folder"
    (folder / "package_of_jobs").mkdir(parents=True)
    for name in ("nested_jobs.py", "package_of_jobs/__init__.py", "package_of_jobs/more.py"):
        (folder / name).write_text("")
    git(repository, "add", "-fA")
    git(repository, "commit", "-qm", "modules")
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(folder)
    return folder


def _submit(said: Said, *load: object) -> tuple[int, str, str]:  # noqa: F811
    words = [word for one in load for word in ("--load", one)]
    return said("submit", "mine", "../run.yaml", "--load", "../module_with_jobs.py", *words, "-n", "0")


@pytest.fixture
def ready(place: Place, said: Said, below: Path) -> Said:  # noqa: F811
    """``said``, with settings, below the top of the repository."""
    _write(place, {"box": {"type": "plain"}})
    return said


def test_files_and_modules_below_the_top_are_found_on_the_host(place: Place, ready: Said) -> None:
    status, out, err = _submit(ready, "./nested_jobs.py", "package_of_jobs/more.py", "nested_jobs", "json")
    assert (status, err) == (0, ""), out
    _until(ready, "mine", "finished (0)")
    words = place.called["argv"]
    code = Path(place.called["env"]["PYTHONPATH"].split(":")[0])
    files = (
        "module_with_jobs.py",
        "a folder/nested_jobs.py",
        "a folder/package_of_jobs/more.py",
        "a folder/nested_jobs.py",
    )
    loaded = [word.removeprefix("--load=") for word in words if word.startswith("--load=")]
    assert loaded == ["json", *(str(code / file) for file in files)]
    assert all(Path(file).is_file() for file in loaded[1:])
    assert (code / files[0]).read_text() == MODULE


@pytest.mark.parametrize(("load", "text"), [
    ("{outside}/mine.py", "--load {outside}/mine.py is outside of {top}, which is all that is sent; copy it into"),
    ("new.py", "--load new.py is {top}/a folder/new.py, which is not part of the code that is sent; git add it"),
    ("new_jobs", "--load new_jobs is {top}/a folder/new_jobs.py, which is not part of the code that is sent; git add it"),
    ("package_of_jobs", "--load package_of_jobs is a folder/package_of_jobs/__init__.py, but the host looks for "
     "modules from the top of the repository; run this in {top}, with --load a folder.package_of_jobs"),
    ("package_of_jobs.more", "run this in {top}, with --load a folder.package_of_jobs.more"),
    ("found_by_path", "--load found_by_path is {outside}/found_by_path.py, found by PYTHONPATH, but only {top} is sent"),
])  # fmt: skip
def test_what_the_host_would_not_find_is_refused(
    load: str, text: str, place: Place, ready: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"outside": tmp_path, "top": place.home / "repository"}
    for file in (Path("new.py"), Path("new_jobs.py"), tmp_path / "mine.py", tmp_path / "found_by_path.py"):
        file.write_text("")
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("new", "new_jobs", "mine", "found_by_path"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    status, out, err = _submit(ready, load.format(**names))
    assert (status, out) == (2, "")
    assert text.format(**names) in err
    assert not (place.home / "scratch").exists()
    for name in ("new", "new_jobs", "mine", "found_by_path"):
        sys.modules.pop(name, None)


def test_a_module_at_the_top_travels_by_its_name(
    place: Place, ready: Said, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    load_module("module_with_jobs")
    words = ("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0", "--dry_run")
    status, out, err = ready(*words)
    assert (status, err) == (0, "")
    assert "--load=module_with_jobs" in out
    assert not (place.home / "scratch").exists()
