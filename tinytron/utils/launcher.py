"""Reading and checking what launchers tell a process about its place in the job, without importing torch."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from tinytron.errors import ConfigError

# The variables in which torchrun, srun, Open MPI and Intel MPI give a process's number on its node.
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
# Set by our launcher for the workers of a run that continues when it loses a node, and in manifests for clusters that start
# pods again: a process that was asked to stop then ends with a status that is not 0.
ELASTIC = "TINYTRON_ELASTIC"
LAUNCHER = "TINYTRON_LAUNCHER"  # set by our launcher for its workers: its process id
_PR_SET_PDEATHSIG = 1  # an option of Linux's prctl
_ADDRESS = "--master_addr, MASTER_ADDR"
NAME_SECONDS = 60.0  # maximum wait for the host name of the first of several nodes


def check_meeting_place(host: str, port: int | None, *, several: bool, flag: str = _ADDRESS) -> None:
    """Check the address where all processes meet (``port`` ``None``: not given), which ``flag`` gives. With ``several``
    nodes, wait if the name cannot be resolved yet. Raises: ConfigError for an address or a port at which torch would wait
    forever."""
    if port is not None and not 1 <= port <= 65535:
        raise ConfigError(
            f"--master_port {port} (MASTER_PORT) must be in 1..65535; use 29500, or on one node --standalone, "
            "which finds a free one"
        )
    await_name(host.strip("[]"), seconds=NAME_SECONDS if several else 0.0, flag=flag)


def stop_with_launcher(environment: MutableMapping[str, str]) -> None:
    """Ask Linux for SIGTERM when the launcher of this worker dies: a killed launcher cannot stop its workers, which would
    train on with no process to stop them. A worker that has a shell between itself and its launcher gets no signal later.

    The signal comes when the launcher's thread that started the worker ends. That is its main thread (cli/launch.py).
    """
    launcher = environment.pop(LAUNCHER, "")  # processes that this one starts have another parent
    if sys.platform != "linux" or not launcher.isdecimal():
        return
    if os.getppid() == int(launcher):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        gone = os.getppid() != int(launcher)  # it died before the call
    else:
        gone = not _is_alive(launcher)
    if gone:
        os.kill(os.getpid(), signal.SIGTERM)


def _is_alive(pid: str) -> bool:
    """True for a process of Linux that has not ended; one that has may still be listed, as a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def local_rank_variable(environment: Mapping[str, str]) -> str:
    """The variable in ``environment`` that has this process's number on its node: ``LOCAL_RANK``, or another launcher's
    variable if a script has set only ``RANK``. Without one, all processes of a node would use its first GPU."""
    names = _LOCAL_RANKS if "RANK" in environment else _LOCAL_RANKS[:1]
    return next((name for name in names if name in environment), _LOCAL_RANKS[0])


def await_name(host: str, *, seconds: float, every: float = 2.0, flag: str = _ADDRESS) -> None:
    """Wait until ``host``, which ``flag`` gives, has an address: the name of a node that starts at the same time may not
    be known yet. Raises: ConfigError after ``seconds``."""
    end = time.monotonic() + seconds
    waited = False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= end:
                raise ConfigError(
                    f"the host name {host} ({flag}) has no address ({error}); use the name or "
                    "IP address of the first node, such as 192.168.1.100, or 127.0.0.1 on one node"
                ) from error
        if not waited:
            print(
                f"{host} ({flag}) has no address yet; trying for {seconds:g} s",
                file=sys.stderr,
                flush=True,
            )
        waited = True
        time.sleep(min(every, seconds))
