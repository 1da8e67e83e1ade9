"""Where jobs are, and where they put the data that they make."""

from __future__ import annotations

import re
from pathlib import Path

from tinytron.errors import ConfigError

_NAME = re.compile(r"[\w.][\w.-]*")
_LONGEST = 100  # characters; a folder's name has at most 255 bytes, some of which are ours


def check_name(kind: str, name: str) -> str:
    """``name``, which becomes a folder. Raises: ConfigError if it cannot."""
    if _NAME.fullmatch(name) is None or name in (".", "..") or len(name) > _LONGEST:
        raise ConfigError(
            f"{kind} {name!r} must be letters, digits, '_', '.' and (not first) '-', at most {_LONGEST}, such as my-run"
        )
    return name


def check_place(name: str, project: str, group: str) -> None:
    """Raises: ConfigError if one of the parts of a job's place cannot be a folder."""
    for kind, part in (("name", name), ("project", project), ("group", group)):
        check_name(kind, part)


def name_of_data(name: str, suffix: str = "") -> str:
    """The name of the shards made of the data ``name``, a path or the name of a dataset."""
    short = Path(name).name.split(".")[0].strip("*?[]_- ") or "tokens"
    return f"{short}_{suffix}" if suffix else short


def folder_of_shards(root: Path, name: str, suffix: str = "") -> Path:
    """The folder for those shards in the output folder ``root``: ``<root>/data/<name>[_<suffix>]``."""
    return root / "data" / name_of_data(name, suffix)
