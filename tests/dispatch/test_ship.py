"""The code that is sent: the commit, or the tree with its changes; what stays behind is said, and nothing is touched."""

from __future__ import annotations

import io
import os
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


def test_without_a_commit_or_git_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"has no commit to send .*; run this in a git repository with a commit"):
        pack(tmp_path, None)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(ConfigError, match="git is not installed here"):
        pack(tmp_path, None)
