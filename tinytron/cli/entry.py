"""How every command and script ends: a user's error prints one line and exits with status 2; Ctrl-C exits with 130, and a
closed output pipe with 141. Process groups are destroyed before the process exits."""

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
from tinytron.utils.launcher import ELASTIC, local_rank_variable, stop_with_launcher
from tinytron.utils.signals import INTERRUPTED, interruptible

_GRACE_SECONDS = 5.0
USER_ERROR = 2
# A worker was asked to stop, in a run that may lose nodes: the remaining ones continue. Or a run on several nodes stopped
# because another node was asked to. The number is that of EX_TEMPFAIL.
TO_BE_CONTINUED = 75
_READER_GONE = 141  # 128 + SIGPIPE
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # write errors that carry no file name


def run(command: Callable[[], int | None]) -> None:
    """Call ``command`` and end the process unless its status (see ``status_of``) is 0."""
    stop_with_launcher(os.environ)
    _print_anything()
    with interruptible(_say_interrupted):
        try:
            status = status_of(command)
            if status in (USER_ERROR, INTERRUPTED):
                # Not sys.exit, which would destroy the process groups and so wait for peers that are in a collective.
                os._exit(status)
        except SystemExit as end:
            if end.code not in (None, 0, INTERRUPTED):
                raise
            status = end.code or 0  # the run was asked to stop, and has saved
            if status == 0 and ELASTIC in os.environ:
                status = TO_BE_CONTINUED
        _destroy_groups()
        if status:
            sys.exit(status)


def status_of(command: Callable[[], int | None]) -> int:
    """Exit status of ``command``: what it returned (None: 0), or the status for the error or interruption that ended it,
    which is also printed in one line. An ``OSError`` counts as a user's error if it names a file or the disk is full."""
    try:
        status = command()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
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
    """Print characters that the terminal or pipe cannot encode as escapes (``\\xe9``) instead of raising an error: a model
    may generate any character, and file names need not be UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _say_interrupted() -> None:
    if _is_first():
        _print_line("interrupted")


def _print_line(text: str) -> None:
    # In one write: this process may be killed at any moment, and workers have unbuffered streams.
    print(f"{text}\n", end="", file=sys.stderr, flush=True)


def _is_first() -> bool:
    """True in the one process of its node that prints for all of them."""
    return os.environ.get(local_rank_variable(os.environ), "0") == "0"


def _said(text: str) -> int:
    # All ranks raise the same error. Local rank 0 prints it; the others leave the launcher time to stop them.
    if not _is_first():
        time.sleep(_GRACE_SECONDS)
    sys.stdout.flush()
    _print_line(f"error: {text}")
    _tell_torchrun(f"error: {text}")
    return USER_ERROR


def _tell_torchrun(text: str) -> None:
    """Write ``text`` to the file from which torchrun takes the message that it prints last about a failed worker."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": text, "timestamp": int(time.time())}, file)


def _last_line(error: TinytronError) -> str:
    """The message. A data loader's worker process wraps it in its traceback, where it is the last line."""
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def _destroy_groups() -> None:
    """Destroy all process groups, and end their threads. On a busy machine, a thread that drops a tensor while the
    interpreter shuts down kills the process with SIGABRT ("terminate called without an active exception")."""
    if "torch.distributed" not in sys.modules:  # a command that never needed it
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # the trainer refers to the groups, and is part of reference cycles
