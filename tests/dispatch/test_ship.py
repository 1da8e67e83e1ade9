"""The code that is sent: the commit, or the tree with its changes; what stays behind is said, and nothing is touched."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.dispatch.conftest import git
from tinytron.dispatch.ship import pack
from tinytron.errors import ConfigError


def _content(code: bytes) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(code)) as tar:
        files = {member.name: tar.extractfile(member) for member in tar.getmembers() if member.isfile()}
        return {name: file.read().decode() for name, file in files.items() if file is not None}


def test_a_clean_tree_is_its_commit_and_the_same_code_has_the_same_name(repository: Path) -> None:
    first = pack(repository, None)
    assert _content(first.files.code) == {"code.py": "first\n", ".gitignore": "ignored/\n"}
    assert first.notes == (f"code: commit {first.commit[:10]} of {repository}",)
    git(repository, "commit", "-q", "--allow-empty", "-m", "again")
    assert pack(repository / ".", None).files.tree == first.files.tree
    assert pack(repository, True).files.tree == first.files.tree


def test_changes_travel_or_not_as_told_and_the_tree_is_not_touched(repository: Path) -> None:
    (repository / "code.py").write_text("changed\n")
    (repository / "staged.py").write_text("staged\n")
    git(repository, "add", "staged.py")
    (repository / "new.py").write_text("new\n")
    (repository / "ignored").mkdir()
    (repository / "ignored" / "data").write_text("x")
    before = git(repository, "status", "--porcelain"), git(repository, "stash", "list")
    with pytest.raises(
        ConfigError, match=r"2 files of .* are not committed \(.*code\.py.*\); commit them, or use --dirty"
    ):
        pack(repository, None)
    dirty = pack(repository, True)
    assert _content(dirty.files.code)["code.py"] == "changed\n"
    assert _content(dirty.files.code)["staged.py"] == "staged\n"
    assert "new.py" not in _content(dirty.files.code)
    assert dirty.notes[1:] == (
        "not sent, untracked (git add them, and use --dirty): new.py",
        "not sent, ignored by git: ignored/",
    )
    assert "with the changes of 2 files" in dirty.notes[0]
    clean = pack(repository, False)
    assert _content(clean.files.code)["code.py"] == "first\n"
    assert "without the changes of 2 files" in clean.notes[0]
    assert before == (git(repository, "status", "--porcelain"), git(repository, "stash", "list"))


def test_a_change_that_is_only_in_the_working_tree_counts(repository: Path) -> None:
    """Its code in git's list is " M", which begins with a space."""
    (repository / "code.py").write_text("changed\n")
    with pytest.raises(ConfigError, match=r"1 file of .* is not committed \(code\.py\)"):
        pack(repository, None)


def test_submodules_are_named(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-q", "--allow-empty", "-m", "x")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(other), "part")
    git(repository, "commit", "-qam", "with a part")
    assert "not sent, submodules: part" in pack(repository, None).notes


def test_changes_in_a_submodule_do_not_count_as_changes(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    (other / "file").write_text("x")
    git(other, "add", "-A")
    git(other, "commit", "-qm", "x")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(other), "sub mod")
    git(repository, "commit", "-qam", "with a part")
    (repository / "sub mod" / "file").write_text("changed")
    for dirty in (None, True):
        shipment = pack(repository, dirty)
        assert shipment.notes == (
            f"code: commit {shipment.commit[:10]} of {repository}",
            "not sent, submodules: sub mod",
        )


def test_files_that_git_leaves_out_of_archives_are_named(repository: Path) -> None:
    (repository / ".gitattributes").write_text("my\\ data/** export-ignore\n*.bin export-ignore\n")
    (repository / "my data").mkdir()
    for name in ("my data/a file", "w.bin"):
        (repository / name).write_text("x")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "attributes")
    shipment = pack(repository, None)
    sent = set(_content(shipment.files.code))
    assert shipment.names == sent
    missing = {".gitattributes", ".gitignore", "code.py", "my data/a file", "w.bin"} - sent
    assert "w.bin" in missing
    assert shipment.notes[1:] == (f"not sent, export-ignore in .gitattributes: {', '.join(sorted(missing))}",)


def test_files_of_options_are_not_said_to_stay_behind(repository: Path) -> None:
    for name in ("run.yaml", "other.yaml", "stage.yaml"):
        (repository / name).write_text("x")
    (repository / ".gitignore").write_text("stage.yaml\n")
    git(repository, "add", ".gitignore")
    git(repository, "commit", "-qm", "x")
    notes = pack(repository, None, ["run.yaml", str(repository / "stage.yaml")]).notes
    assert notes[1:] == ("not sent, untracked (git add them, and use --dirty): other.yaml",)


@pytest.mark.parametrize("dirty", [None, True])
def test_changes_that_git_cannot_save_get_their_own_advice(repository: Path, dirty: bool | None) -> None:
    (repository / "a new.py").write_text("x")
    git(repository, "add", "-N", "a new.py")
    with pytest.raises(ConfigError, match=r"git add -N announced, .* \(a new\.py\); git add them, .* or use --clean"):
        pack(repository, dirty)
    assert "a new.py" not in pack(repository, False).names
    git(repository, "rm", "-q", "--cached", "a new.py")
    first = git(repository, "branch", "--show-current").strip()
    git(repository, "branch", "other")
    for branch, text in (("other", "one\n"), (first, "two\n")):
        git(repository, "checkout", "-q", branch)
        (repository / "code.py").write_text(text)
        git(repository, "commit", "-qam", text)
    with pytest.raises(subprocess.CalledProcessError):
        git(repository, "merge", "-q", "other")
    with pytest.raises(ConfigError, match=r"in the middle of a merge \(code\.py\); finish it with .* or use --clean"):
        pack(repository, dirty)
    assert _content(pack(repository, False).files.code)["code.py"] == "two\n"


def test_a_file_that_was_renamed_counts_once(repository: Path) -> None:
    git(repository, "mv", "code.py", "ab cd.py")
    git(repository, "commit", "-qm", "a name whose third letter is a space")
    git(repository, "mv", "ab cd.py", "new.py")
    with pytest.raises(ConfigError, match=r"1 file of .* is not committed \(new\.py\)"):
        pack(repository, None)
    assert pack(repository, True).names == {"new.py", ".gitignore"}


def test_without_a_commit_or_git_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"has no commit to send .*; run this in a git repository with a commit"):
        pack(tmp_path, None)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(ConfigError, match="git is not installed here"):
        pack(tmp_path, None)
