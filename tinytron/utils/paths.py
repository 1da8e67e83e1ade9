"""Paths as users write them, and what lies below their folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def expanded(text: str) -> str:
    """``text`` with a ``~`` or a ``$VARIABLE`` at its start as the shell reads them, which it does not in ``--flag=~/x``,
    a file or a variable's value. Other texts stay as they are."""
    if text.startswith("~"):
        return os.path.expanduser(text)
    return os.path.expandvars(text) if text.startswith("$") else text


def user_path(text: str) -> Path:
    """The path that a user wrote (see ``expanded``)."""
    return Path(expanded(text))


def tidy(text: str) -> str:
    """One spelling of a path that exists, seen from the current folder if it is below that; other texts stay."""
    if not os.path.exists(text):
        return text
    relative = os.path.relpath(text)
    return os.path.abspath(text) if relative.startswith(os.pardir) else relative


def files_below(folder: Path, *, hidden: bool = True) -> Iterator[Path]:
    """The files below ``folder``, also behind links, in no particular order; a folder that is reached twice, as a link to
    one of its parents is, counts once. Without ``hidden``, names that begin with a dot are left out."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(".")]
            names = [name for name in names if not name.startswith(".")]
        folders.sort()  # which of two links to one folder counts does not depend on the file system
        yield from (path for name in names if (path := Path(place, name)).is_file())
