"""Locks on folders. A lock belongs to a process: the kernel releases it when the process ends, however it ends.

The locks are POSIX record locks (``lockf``), which a forked child does not inherit, so a loader worker that outlives its
killed run does not keep the lock. They do not exclude threads of the same process.
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
    """Lock ``folder`` against other processes until the returned file is closed or this process ends.

    On a file system without locks this does nothing. Raises: ConfigError if another process holds the lock; it names that
    process and its host, and ends with ``remedy``, the user's way out.
    """
    path = folder / ".lock"
    try:
        file = _open_shared(path)
    except BlockingIOError:  # another user's process holds it
        raise _in_use(folder, path.read_text(), remedy) from None
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
    except KeyError:  # a user of another machine
        return f"user {path.stat().st_uid}"


def _in_use(folder: Path, holder: str, remedy: str) -> ConfigError:
    return ConfigError(f"run folder {folder} is in use by {holder.strip() or 'another run'}; {remedy}")


@contextlib.contextmanager
def wait_for_lock(path: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock file ``path``, which locks its folder, and wait first if another process holds it; ``say`` is called
    before a wait. Raises: OSError, also on a file system without locks."""
    waits = f"waiting for another process that is preparing {path.parent}"
    try:
        shared = _open_shared(path)
    except BlockingIOError:  # another user's process holds it
        say(waits)
        with open(path) as other:
            fcntl.lockf(other, fcntl.LOCK_SH)
        shared = _open_shared(path)
    with shared as file:
        if not _try_lock(file):
            say(waits)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _open_shared(path: Path) -> IO[str]:
    """Open the lock file and let every user with write access to its folder use it. Raises: PermissionError."""
    try:
        file = open(path, "a+")  # noqa: SIM115  # stays open, because closing it would release the lock
    except PermissionError:
        if not path.exists():
            raise
        _remove_free_lock(path)  # another user made it without access for others
        file = open(path, "a+")  # noqa: SIM115
    with contextlib.suppress(PermissionError):  # the file may belong to another user
        os.fchmod(file.fileno(), 0o666)
    return file


def _remove_free_lock(path: Path) -> None:
    """Remove the lock file. Raises: PermissionError if the folder is not writable, BlockingIOError if a process holds the
    lock."""
    with open(path) as file:  # read access is enough for a shared lock
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        path.unlink()


def _try_lock(file: IO[str]) -> bool:
    """Take the lock if it is free; returns whether it was. Raises: OSError on a file system without locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
