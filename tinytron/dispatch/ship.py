"""The code that a job runs: a commit of the repository, or its working tree, as a tar.gz. Nothing in it is touched."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinytron.dispatch.hosts import Files
from tinytron.errors import ConfigError
from tinytron.utils.texts import counted

_NAMED = 5  # file names in a message
_UNMERGED = ("DD", "AU", "UD", "UA", "DU", "AA", "UU")  # git's two letters for files in conflict
_NO_COMMIT = "has no commit to send ({}); run this in a git repository with a commit: git init, git add, git commit"


@dataclass(frozen=True)
class Shipment:
    """The code as files to send, the ``commit`` it is based on, and ``notes``: what does and does not travel. ``names`` are
    the paths of all its files in the repository ``top``."""

    files: Files
    commit: str
    notes: tuple[str, ...]
    top: Path = Path()
    names: frozenset[str] = frozenset()


def pack(folder: Path, dirty: bool | None, options: Sequence[str] = ()) -> Shipment:
    """The repository that ``folder`` is in: ``HEAD``; with ``dirty`` also the uncommitted changes of tracked files.
    ``options`` are files that travel by themselves.

    ``None``: there must not be any. Raises: ConfigError for a folder without a commit, and for such changes.
    """
    top = Path(_git(folder, "rev-parse", "--show-toplevel", wrong=_NO_COMMIT).removesuffix("\n"))
    commit = _git(top, "rev-parse", "HEAD", wrong=_NO_COMMIT).strip()
    states = _states(top)
    untracked = [name for name, state in states.items() if state == "??"]
    changed = [name for name, state in states.items() if state != "??"]
    if dirty is not False:
        _check_can_be_saved(top, states)
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
    code = _archive(top, tree)
    with tarfile.open(fileobj=io.BytesIO(code)) as tar:
        names = frozenset(member.name for member in tar.getmembers() if not member.isdir())
    kinds = {}
    for line in _lines(_git(top, "ls-tree", "-r", "-z", tree)):
        about, _, name = line.partition("\t")
        kinds[name] = about.split()[1]
    own = {os.path.relpath(Path(file).expanduser().resolve(), top) for file in options}
    ignored = _lines(_git(top, "ls-files", "-oi", "--exclude-standard", "--directory", "-z"))
    left = {
        "untracked (git add them, and use --dirty)": [name for name in untracked if name not in own],
        "ignored by git": [name for name in ignored if name not in own],
        "export-ignore in .gitattributes": [n for n, kind in kinds.items() if kind == "blob" and n not in names],
        "submodules": [name for name, kind in kinds.items() if kind == "commit"],
    }
    notes = [_first_note(top, commit, changed, dirty)]
    notes += [f"not sent, {why}: {_listed(missing)}" for why, missing in left.items() if missing]
    return Shipment(Files(tree, code), commit, tuple(notes), top, names)


def _states(top: Path) -> dict[str, str]:
    """The two letters of ``git status`` for each file that differs from the last commit. Submodules do not count: they do
    not travel, whatever is in them."""
    words = iter(_lines(_git(top, "status", "--porcelain", "-z", "--untracked-files=all", "--ignore-submodules=all")))
    found = {}
    for word in words:
        state, name = word[:2], word[3:]
        found[name] = state
        if "R" in state or "C" in state:
            next(words)  # the old name
    return found


def _check_can_be_saved(top: Path, states: dict[str, str]) -> None:
    """Raises: ConfigError for changes of which git cannot make a commit."""
    clean = "or use --clean to send the last commit"
    if unmerged := [name for name, state in states.items() if state in _UNMERGED]:
        raise ConfigError(
            f"{top} is in the middle of a merge ({_listed(unmerged)}); finish it with git add and git commit, {clean}"
        )
    if announced := [name for name, state in states.items() if state == " A"]:
        raise ConfigError(
            f"{top} has files that git add -N announced, but that were not added ({_listed(announced)}); git add them, "
            f"and use --dirty or commit them, {clean}"
        )


def _first_note(top: Path, commit: str, changed: list[str], dirty: bool | None) -> str:
    note = f"code: commit {commit[:10]} of {top}"
    if changed:
        note += f", {'with' if dirty else 'without'} the changes of {counted(len(changed), 'file')}: {_listed(changed)}"
    return note


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\0") if line]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _archive(top: Path, tree: str) -> bytes:
    done = subprocess.run(["git", "-C", str(top), "archive", "--format=tar.gz", tree], capture_output=True, check=False)
    if done.returncode:
        raise ConfigError(f"git cannot archive {top}: {done.stderr.decode('utf-8', 'replace').strip()}; see git status")
    return done.stdout


def _git(folder: Path, *words: str, wrong: str = "is a repository in which git fails ({}); see git status") -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("git is not installed here, but it packs the code; install git") from error
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        raise ConfigError(f"{folder} {wrong.format(lines[-1])}")
    return done.stdout.decode("utf-8", "surrogateescape")
