"""Folders that appear whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tinytron.errors import ConfigError
from tinytron.utils.training import sync_folder


def check_new(out: Path) -> None:
    """Raises: ConfigError if ``out`` is there and is not an empty folder."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"--out {out} is there already; use another name, or remove it")


@contextlib.contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary neighbor of ``out`` to write files into; it becomes ``out`` at the end, on the disk, and is removed
    after an error. With ``replace`` an older ``out`` goes when the new one is whole. Raises: ConfigError as ``check_new``,
    OSError if the disk refuses."""
    if not replace:
        check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same number
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        if replace:
            shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(out.parent)


def remove_leftovers(parent: Path) -> None:
    """Delete what killed processes left half written in ``parent``. Raises: OSError if the system refuses."""
    for path in parent.glob(".*.tmp.*"):
        shutil.rmtree(path)
