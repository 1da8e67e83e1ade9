"""Where jobs put the data that they make."""

from __future__ import annotations

from pathlib import Path


def name_of_data(name: str, suffix: str = "") -> str:
    """The name of the shards made of the data ``name``, a path or the name of a dataset."""
    short = Path(name).name.split(".")[0].strip("*?[]_- ") or "tokens"
    return f"{short}_{suffix}" if suffix else short


def folder_of_shards(root: Path, name: str, suffix: str = "") -> Path:
    """The folder for those shards in the output folder ``root``: ``<root>/data/<name>[_<suffix>]``."""
    return root / "data" / name_of_data(name, suffix)
