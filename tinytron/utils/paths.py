"""Paths as users write them, and the files below a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from tinytron.errors import ConfigError, DataError


def expanded(text: str) -> str:
    """The path ``text`` with a leading ``~`` or ``$VARIABLE`` expanded as in a shell. The shell itself does not expand them
    in ``--flag=~/x``, in files or in a variable's value. Raises: ConfigError for an unknown user or variable."""
    if text.startswith("~") and (home := os.path.expanduser(text)) != text:
        return home
    if text.startswith("~"):
        raise ConfigError(f"the path {text}: there is no such user; write ./{text} if its name starts like that")
    if text.startswith("$"):
        variables = re.findall(r"\$(?:\w+|\{[^}]*\})", text) or ["$"]
        if missing := [variable for variable in variables if os.path.expandvars(variable) == variable]:
            raise ConfigError(f"the path {text}: {missing[0]} is not set; write ./{text} if its name starts like that")
        return os.path.expandvars(text)
    return text


def user_path(text: str) -> Path:
    """The path that a user wrote (see ``expanded``)."""
    return Path(expanded(text))


def one_spelling(text: str) -> str:
    """The absolute path without links if ``text`` is a path that exists, so that it is the same from every folder; any
    other text is returned unchanged."""
    return os.path.realpath(text) if os.path.exists(text) else text


def files_below(folder: Path, *, hidden: bool = True) -> Iterator[Path]:
    """The files below ``folder``, in no particular order. Links are followed; a folder that is reached twice, for
    example by a link to one of its parents, counts once. Without ``hidden``, names that begin with a dot are left out.
    Raises: DataError for a folder that cannot be read, because its files would be missing silently."""
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
        folders.sort()  # so that the file system does not determine which of two links to one folder counts
        yield from (path for name in names if (path := Path(place, name)).is_file())


def _refuse(error: OSError) -> None:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return  # a folder that does not exist has no files
    raise DataError(
        f"{error.filename} cannot be read ({error.strerror}); make it readable, or move it elsewhere"
    ) from error
