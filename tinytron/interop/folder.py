"""Folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tinytron.errors import ConfigError
from tinytron.utils.training import sync_folder


def check_new(out: Path) -> None:
    """Raises: ConfigError if ``out`` exists and is not an empty folder."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"--out {out} already exists; use another name, or remove it")


@contextlib.contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder next to ``out`` to write files into. At the end it is flushed to disk and renamed to ``out``;
    after an error it is removed. With ``replace``, an older ``out`` is deleted once the new one is complete. Raises:
    ConfigError as ``check_new``; OSError if writing fails."""
    if not replace:
        check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same process id
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
    """Delete the half-written folders that killed processes left in ``parent``. Raises: OSError if deleting fails."""
    for path in parent.glob(".*.tmp.*"):
        shutil.rmtree(path)
