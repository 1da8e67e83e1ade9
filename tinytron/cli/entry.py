"""How every command and script ends: with one line and status 2 after a user's error, with 130 after Ctrl-C, with 141 when
its reader has gone, and with the process group taken down."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import json
import os
import sys
import time
from collections.abc import Callable

from tinytron.errors import TinytronError
from tinytron.utils.launcher import local_rank_variable
from tinytron.utils.signals import INTERRUPTED, interruptible

_GRACE_SECONDS = 5.0
_USER_ERROR = 2
_READER_GONE = 141  # 128 + SIGPIPE
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of writing, which name no file


def run(command: Callable[[], int | None]) -> None:
    """Call ``command`` and end the process unless its status (see ``status_of``) is 0."""
    _print_anything()
    with interruptible(_say_interrupted):
        try:
            status = status_of(command)
            if status in (_USER_ERROR, INTERRUPTED):
                os._exit(
                    status
                )  # not sys.exit: a peer may be in a collective, and taking its group down would wait for it
        except SystemExit as end:
            if end.code not in (None, 0, INTERRUPTED):
                raise
            status = end.code or 0  # a run that was asked to stop, and has saved
        _destroy_groups()
        if status:
            sys.exit(status)


def status_of(command: Callable[[], int | None]) -> int:
    """The exit status of ``command``: what it returns (None: 0), or that of the error or interruption it ended in, which is
    then said in one line. An ``OSError`` counts as the user's if it names a file or if the disk is full."""
    try:
        status = command()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    except TinytronError as error:
        return _said(_last_line(error))
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_FULL:
            raise
        return _said(str(error))
    except KeyboardInterrupt:
        sys.stdout.flush()
        _say_interrupted()
        return INTERRUPTED
    return status or 0


def _print_anything() -> None:
    """Show characters that a terminal or pipe has no code for as escapes (``\\xe9``) instead of ending in an error: a model
    may write any, and names of files need not be UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _say_interrupted() -> None:
    if _is_first():
        print("interrupted", file=sys.stderr, flush=True)


def _is_first() -> bool:
    """Whether this process speaks for those of its node."""
    return os.environ.get(local_rank_variable(os.environ), "0") == "0"


def _said(text: str) -> int:
    # All ranks raise the same error. Local rank 0 says it; the others give the launcher time to stop them.
    if not _is_first():
        time.sleep(_GRACE_SECONDS)
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr, flush=True)
    _tell_torchrun(f"error: {text}")
    return _USER_ERROR


def _tell_torchrun(text: str) -> None:
    """Write ``text`` to the file from which torchrun takes what it says, last of all, about a worker that has failed."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": text, "timestamp": int(time.time())}, file)


def _last_line(error: TinytronError) -> str:
    """The message; a data loader's worker process wraps it in its traceback, of which it is the last line."""
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def _destroy_groups() -> None:
    """Take all process groups down, and end their threads. One that is about to drop a tensor when the interpreter shuts
    down, on a busy machine, would end the process by SIGABRT ("terminate called without an active exception")."""
    if "torch.distributed" not in sys.modules:  # a command that never needed it
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # a trainer, which refers to groups, is part of circles
