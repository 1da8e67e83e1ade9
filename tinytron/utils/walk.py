"""Walking a user's folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


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
