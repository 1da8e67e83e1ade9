"""Paths as users write them, and what lies below their folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from tinytron.errors import ConfigError, DataError


def expanded(text: str) -> str:
    """The path ``text`` with a ``~`` or a ``$VARIABLE`` at its start as the shell reads them, which it does not in
    ``--flag=~/x``, a file or a variable's value. Raises: ConfigError if there is no such user or variable."""
    if text.startswith("~") and (home := os.path.expanduser(text)) != text:
        return home
    if text.startswith("~"):
        raise ConfigError(f"the path {text}: there is no such user; write ./{text} if its name begins so")
    if text.startswith("$"):
        variables = re.findall(r"\$(?:\w+|\{[^}]*\})", text) or ["$"]
        if missing := [variable for variable in variables if os.path.expandvars(variable) == variable]:
            raise ConfigError(f"the path {text}: {missing[0]} is not set; write ./{text} if its name begins so")
        return os.path.expandvars(text)
    return text


def user_path(text: str) -> Path:
    """The path that a user wrote (see ``expanded``)."""
    return Path(expanded(text))


def one_spelling(text: str) -> str:
    """A path that exists without links, from the root: the same from every folder; other texts stay."""
    return os.path.realpath(text) if os.path.exists(text) else text


def files_below(folder: Path, *, hidden: bool = True) -> Iterator[Path]:
    """The files below ``folder``, also behind links, in no particular order; a folder that is reached twice, as a link to
    one of its parents is, counts once. Without ``hidden``, names that begin with a dot are left out. Raises: DataError for
    a folder that cannot be read: what is in it would be missing in silence."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
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


def _refuse(error: OSError) -> None:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return  # nothing is below what is not there
    raise DataError(
        f"{error.filename} cannot be read ({error.strerror}); give it read permission, or take it out"
    ) from error
