"""The lock that a living run, or a tool that deletes, holds on its run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from pathlib import Path
from typing import IO

from tinytron.errors import ConfigError


def lock_folder(folder: Path, remedy: str) -> IO[str]:
    """Keep others out of ``folder`` until the result is closed or this process ends, however it ends.

    Raises: ConfigError if it is taken, naming the holder's host and process, and ``remedy``, what the user can do.
    """
    file = open(folder / ".lock", "a+")  # noqa: SIM115  # stays open: the lock lives as long as the file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: a killed run's lock is gone with it
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return file  # this file system has no locks
        file.seek(0)
        holder = file.read().strip() or "another run"
        file.close()
        raise ConfigError(f"run folder {folder} is in use by {holder}; {remedy}") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file
