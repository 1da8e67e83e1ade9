"""Jobs by name: listed without importing them, registered once, loaded from modules and files of the user's."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT
from tinytron.errors import ConfigError
from tinytron.experiments import builtin as experiments
from tinytron.job import BasicJob
from tinytron.jobs.kinds import job_class
from tinytron.registry import DATASETS, EVALUATIONS, JOBS, Registry, dataset, evaluation, job, load_module


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """An empty registry of jobs."""
    monkeypatch.setattr(experiments, "JOBS", {})
    return Registry("job", "JOBS", "tinytron.jobs.tests")


def test_listing_imports_no_torch() -> None:
    code = "import sys\nfrom tinytron.cli.main import main\nmain(['jobs'])\nassert 'torch' not in sys.modules"
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for key, (_, text) in experiments.JOBS.items():
        assert f"{key}" in listed
        assert text in listed


@pytest.mark.parametrize("key", sorted(experiments.JOBS))
def test_every_built_in_job_is_registered_by_its_module(key: str) -> None:
    assert issubclass(job_class(key), BasicJob)
    assert JOBS[key].__module__ == experiments.JOBS[key][0]
    assert JOBS[key].__doc__


def test_a_name_twice_is_an_error_that_names_both(registry: Registry) -> None:
    class One:
        pass

    class Two:
        pass

    registry.add("a/b", One)
    registry.add("a/b", One)  # the same again, as a notebook's cell does
    with pytest.raises(ConfigError, match=r"a/b is registered twice, by .*One \(.*py:\d+\) and by .*Two \(.*py:\d+\)"):
        registry.add("a/b", Two)
    assert registry["a/b"] is One


def test_a_name_of_ours_is_taken() -> None:
    with pytest.raises(ConfigError, match=r"registered twice, by tinytron\.experiments\.gpt.* and by .*Mine"):

        @job("gpt/train/pretrain")
        class Mine(BasicJob):
            pass


@pytest.mark.parametrize("key", ["", "/a", "a//b", "a b", "a/"])
def test_malformed_names_are_refused(registry: Registry, key: str) -> None:
    with pytest.raises(ConfigError, match="is not a name like"):
        registry.add(key, BasicJob)


def test_a_name_of_other_pages_is_the_same_job() -> None:
    assert JOBS["gpt/pretrain"] is JOBS["gpt/train/pretrain"]
    assert "gpt/pretrain" not in list(JOBS)


def test_the_nearest_name_is_proposed() -> None:
    with pytest.raises(ConfigError, match="there is no job gpt/train/pretrian; did you mean gpt/train/pretrain"):
        _ = JOBS["gpt/train/pretrian"]
    with pytest.raises(ConfigError, match="there is no job zzzz; tinytron jobs lists them"):
        _ = JOBS["zzzz"]


def test_installed_packages_bring_jobs(registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Listed without importing their module."""
    (tmp_path / "their_jobs.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("their/job", "their_jobs:Job", "tinytron.jobs.tests")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == "tinytron.jobs.tests" else [])
    assert list(registry) == ["their/job"]
    assert registry.help("their/job") == "their_jobs:Job"
    with pytest.raises(ConfigError, match=r"their_jobs cannot be imported \(RuntimeError: imported\)"):
        _ = registry["their/job"]


def test_a_module_that_does_not_register_what_it_promised(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("their/job", "json:Job", "tinytron.jobs.tests")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    with pytest.raises(ConfigError, match="json does not register the job their/job"):
        _ = registry["their/job"]


def test_files_and_modules_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports = "from tinytron.job import BasicJob\nfrom tinytron.registry import job\n"
    text = imports + "@job('{0}')\nclass Mine(BasicJob):\n    '''Do it.'''\n"
    (tmp_path / "loaded_file.py").write_text(text.format("loaded/file"))
    (tmp_path / "loaded_module.py").write_text(text.format("loaded/module"))
    monkeypatch.chdir(tmp_path)
    load_module("loaded_file.py")
    load_module("loaded_file.py")
    load_module("loaded_module")
    assert JOBS.help("loaded/file") == JOBS.help("loaded/module") == "Do it."
    assert job_class("loaded/file").__name__ == "Mine"


@pytest.mark.parametrize(
    ("text", "says"),
    [("import nothing_of_this_name", "ModuleNotFoundError"), ("def (", "SyntaxError"), (None, "No such file")],
)
def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "broken_jobs.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_module(str(file))
    assert "\n" not in str(caught.value)
    assert "broken_jobs" not in sys.modules


def test_datasets_and_evaluations_have_registries() -> None:
    @dataset("tests/data")
    def data() -> None: ...

    @evaluation("tests/evaluation")
    def evaluated() -> None: ...

    assert DATASETS["tests/data"] is data
    assert EVALUATIONS["tests/evaluation"] is evaluated


def test_something_else_is_no_job(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.add("a/function", test_something_else_is_no_job)
    monkeypatch.setattr("tinytron.jobs.kinds.JOBS", registry)
    with pytest.raises(ConfigError, match=r"register a subclass of Trainer or of tinytron\.job\.BasicJob"):
        job_class("a/function")


def test_every_job_of_the_package_is_in_the_table() -> None:
    """Otherwise no command finds it."""
    files = (ROOT / "tinytron" / "experiments").glob("*.py")
    keys = [key for path in files for key in re.findall(r'^@job\("([\w/]+)"\)$', path.read_text(), re.MULTILINE)]
    assert len(keys) >= 15
    assert sorted(keys) == sorted(set(keys) & set(experiments.JOBS))


def test_the_pages_configure_jobs_that_exist() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {(key, page.name) for page in pages for key in re.findall(r"tinytron configure ([\w/]+)", page.read_text())}
    assert len(named) > 10
    own = {"JOB", "my_model/train/pretrain"}  # a placeholder, and a job of the reader
    assert {(key, page) for key, page in named if key not in own and key not in JOBS} == set()
