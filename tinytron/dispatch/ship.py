"""The code that a job runs: a commit of the repository, or its working tree, as a tar.gz. Nothing in it is touched."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinytron.dispatch.hosts import Files
from tinytron.errors import ConfigError
from tinytron.utils.texts import counted

_NAMED = 5  # file names in a message


@dataclass(frozen=True)
class Shipment:
    """The code as files to send, the ``commit`` it is based on, and ``notes``: what does and does not travel."""

    files: Files
    commit: str
    notes: tuple[str, ...]


def pack(folder: Path, dirty: bool | None) -> Shipment:
    """The repository that ``folder`` is in: ``HEAD``; with ``dirty`` also the uncommitted changes of tracked files.

    ``None``: there must not be any. Raises: ConfigError for a folder without a commit, and for such changes.
    """
    top = Path(_git(folder, "rev-parse", "--show-toplevel").strip())
    commit = _git(top, "rev-parse", "HEAD").strip()
    status = [line for line in _git(top, "status", "--porcelain", "-z", "--untracked-files=all").split("\0") if line]
    untracked = [line[3:] for line in status if line.startswith("??")]
    changed = [line[3:] for line in status if line[2:3] == " " and not line.startswith("??")]
    if changed and dirty is None:
        raise ConfigError(
            f"{counted(len(changed), 'file')} of {top} {'is' if len(changed) == 1 else 'are'} not committed "
            f"({_listed(changed)}); commit them, or use --dirty to send them, or --clean to send the last commit"
        )
    source = commit
    if dirty and changed:
        source = (
            _git(top, *("-c", "user.name=tinytron", "-c", "user.email=tinytron"), "stash", "create").strip() or commit
        )
    tree = _git(top, "rev-parse", f"{source}^{{tree}}").strip()
    return Shipment(Files(tree, _archive(top, tree)), commit, tuple(_notes(top, commit, changed, untracked, dirty)))


def _notes(top: Path, commit: str, changed: list[str], untracked: list[str], dirty: bool | None) -> list[str]:
    notes = [f"code: commit {commit[:10]} of {top}"]
    if changed and dirty:
        notes[0] += f", with the changes of {counted(len(changed), 'file')}: {_listed(changed)}"
    elif changed:
        notes[0] += f", without the changes of {counted(len(changed), 'file')}: {_listed(changed)}"
    ignored = [
        line for line in _git(top, "ls-files", "-oi", "--exclude-standard", "--directory", "-z").split("\0") if line
    ]
    submodules = [line.split()[1] for line in _git(top, "submodule", "status").splitlines() if len(line.split()) > 1]
    left = [
        (untracked, "untracked (git add them, and use --dirty)"),
        (ignored, "ignored by git"),
        (submodules, "submodules"),
    ]
    return [*notes, *(f"not sent, {why}: {_listed(names)}" for names, why in left if names)]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _archive(top: Path, tree: str) -> bytes:
    done = subprocess.run(["git", "-C", str(top), "archive", "--format=tar.gz", tree], capture_output=True, check=False)
    if done.returncode:
        raise ConfigError(f"git cannot archive {top}: {done.stderr.decode('utf-8', 'replace').strip()}; see git status")
    return done.stdout


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("git is not installed here, but it packs the code; install git") from error
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        raise ConfigError(
            f"{folder} has no commit to send ({lines[-1]}); run this in a git repository with a commit: git init, "
            "git add, git commit"
        )
    return done.stdout.decode("utf-8", "surrogateescape")
