"""Parts of a rehearsal, forked from a process that has imported what they need: 18 fresh ones would import for minutes."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

NEEDED = ("torch", "tinytron.training", "tinytron.training.dry_run", "pytest", "hypothesis", "triton")
PEERS = ("transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


def preload() -> None:
    """Import what parts need, as far as it is installed."""
    for name in (*NEEDED, *PEERS):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def end_with_the_parent() -> None:
    """In a new child on Linux: end when the driver is killed. What the child has started ends with ``kill_marked``."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


class Forked:
    """``python -m module arguments`` in a fork, with the part of subprocess.Popen's interface that Pool uses. ``variables``
    are added to the environment."""

    def __init__(
        self, module: str, arguments: Sequence[str], cwd: Path, log: IO[bytes], variables: Mapping[str, str]
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(variables)
            _run(module, arguments, cwd, log)

    def poll(self) -> int | None:
        """The exit status, or ``None`` while it runs; minus the signal's number if one ended it."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit status. Raises: TimeoutError after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} runs on")
            time.sleep(0.02)
        return self.returncode or 0


def _run(module: str, arguments: Sequence[str], cwd: Path, log: IO[bytes]) -> NoReturn:
    """The child: never returns to the code of its parent."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        end_with_the_parent()
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
