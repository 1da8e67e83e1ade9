"""Locks on folders. A lock belongs to a process: the kernel releases it when the process ends, however it ends.

The locks are POSIX record locks (``lockf``), which a forked child does not inherit: a loader worker that outlives its
killed run holds nothing. They do not keep threads of one process apart.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from tinytron.errors import ConfigError


def lock_folder(folder: Path, remedy: str) -> IO[str]:
    """Refuse to share ``folder``: keep others out until the result is closed or this process ends.

    A file system without locks locks nothing. Raises: ConfigError if another process holds the lock, naming its host and
    process, and ``remedy``, what the user can do.
    """
    path = folder / ".lock"
    try:
        file = _open_shared(path)
    except BlockingIOError:  # a colleague's process has it
        raise _in_use(folder, path.read_text(encoding="utf-8"), remedy) from None
    except PermissionError as error:
        raise ConfigError(
            f"run folder {folder} cannot be written; ask its owner, {_owner(folder)}, or use another --exp_name"
        ) from error
    try:
        taken = not _try_lock(file)
    except OSError:
        return file  # this file system has no locks
    if taken:
        file.seek(0)
        holder = file.read()
        file.close()
        raise _in_use(folder, holder, remedy)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:  # of another machine
        return f"user {path.stat().st_uid}"


def _in_use(folder: Path, holder: str, remedy: str) -> ConfigError:
    return ConfigError(f"run folder {folder} is in use by {holder.strip() or 'another run'}; {remedy}")


@contextlib.contextmanager
def wait_for_lock(path: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Take turns: hold the lock of the file ``path`` and so of its folder, after waiting for the process that has it,
    which ``say`` is told. Raises: OSError, also from a file system without locks."""
    waits = f"waiting for another process that prepares {path.parent}"
    try:
        shared = _open_shared(path)
    except BlockingIOError:  # a colleague's process has it
        say(waits)
        with open(path, encoding="utf-8") as other:
            fcntl.lockf(other, fcntl.LOCK_SH)
        shared = _open_shared(path)
    with shared as file:
        if not _try_lock(file):
            say(waits)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _open_shared(path: Path) -> IO[str]:
    """The lock file, which everybody who may write its folder may use. Raises: PermissionError."""
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # stays open: the lock lives as long as the file
    except PermissionError:
        if not path.exists():
            raise
        _remove_free_lock(path)  # of a colleague who made it for himself
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with contextlib.suppress(PermissionError):  # it is somebody else's
        os.fchmod(file.fileno(), 0o666)
    return file


def _remove_free_lock(path: Path) -> None:
    """Raises: PermissionError unless nobody holds the lock and the folder may be written."""
    with open(path, encoding="utf-8") as file:  # a shared lock needs no more
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        path.unlink()


def _try_lock(file: IO[str]) -> bool:
    """Take the lock unless another process has it. Raises: OSError from a file system without locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
