"""Reading and checking what launchers tell a process about its place in the job, without importing torch."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Mapping

from tinytron.errors import ConfigError

# The variables in which torchrun, srun, Open MPI and Intel MPI give a process's number on its node.
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
# Set by our launcher for the workers of a run that continues when it loses a node, and in manifests for clusters that start
# pods again: a process that was asked to stop then ends with a status that is not 0.
ELASTIC = "TINYTRON_ELASTIC"
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
