"""torchrun's variables for processes that srun or mpirun started without it, without importing torch."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tinytron.errors import ConfigError


class Launcher(NamedTuple):
    """The variables in which a launcher tells a process its place. ``local_size`` is the number of processes on its node;
    srun says it for all nodes together (see ``_processes_here``)."""

    size: str
    rank: str
    local_rank: str
    local_size: str


# mpirun comes first: on several nodes of SLURM it starts its own daemons by srun, whose variables its processes inherit.
_LAUNCHERS = (
    Launcher(
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    ),
    Launcher("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    Launcher("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # Intel MPI, MPICH
    Launcher("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)
# The values in a process that is alone.
_ALONE = {**{each.size: 1 for each in _LAUNCHERS}, **{each.rank: 0 for each in _LAUNCHERS}, "PMIX_RANK": 0}
# The same on all processes of a job, and different for another job: the port is chosen by them.
_JOBS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri")
_NODES = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
_FIRST_PORT, _PORTS = 20_000, 10_000  # below those that Linux gives to connections
LOOPBACK = "127.0.0.1"


def torchrun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would have set for this process of srun, Open MPI, Intel MPI, MPICH or MVAPICH. Empty for
    a process that is alone or has ``RANK``. Raises: ConfigError if it is one of several, and something is not known."""
    telling = [
        name for name, alone in _ALONE.items() if _is_number(environment, name) and int(environment[name]) > alone
    ]
    if "RANK" in environment or not telling:
        return {}

    def cannot_join(reason: str) -> ConfigError:
        return ConfigError(
            f"{telling[0]}={environment[telling[0]]}, but RANK is not set: the processes would train separately "
            f"({reason}); start one per node, which runs torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT"
        )

    launcher = next((each for each in _LAUNCHERS if each.size in environment), None)
    if launcher is None:
        raise cannot_join("the number of processes is not known")
    if missing := [name for name in launcher[:3] if not _is_number(environment, name)]:
        raise cannot_join(f"{missing[0]} is not a number")
    size, rank, local_rank = (int(environment[name]) for name in launcher[:3])
    if launcher.size == "PMI_SIZE" and environment.get("SLURM_STEP_NUM_TASKS", str(size)) != str(size):
        raise cannot_join("SLURM_STEP_NUM_TASKS is another number of processes than PMI_SIZE")
    here = _processes_here(environment, launcher)
    if not (rank < size and local_rank < (here or size) <= size):
        raise cannot_join(f"{launcher.rank}={rank} and {launcher.local_rank}={local_rank} do not fit it")
    host = environment.get("MASTER_ADDR") or (LOOPBACK if here == size else first_host(environment))
    if host is None:
        raise cannot_join("nothing tells the address of the first node")
    found = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank}
    if here is not None:
        found["LOCAL_WORLD_SIZE"] = here
    port = environment.get("MASTER_PORT") or str(_port(environment[name] for name in _JOBS if name in environment))
    return {name: str(value) for name, value in found.items()} | {"MASTER_ADDR": host, "MASTER_PORT": port}


def first_host(environment: Mapping[str, str]) -> str | None:
    """The first node of SLURM's list, such as ``gpu-003`` of ``gpu-[003-007,9],cpu1``; ``None`` without a list."""
    text = next((environment[name] for name in _NODES if environment.get(name)), None)
    if text is None:
        return None
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", text)
    assert first is not None, "the pattern matches any text"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _is_number(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").isdecimal()


def _processes_here(environment: Mapping[str, str], launcher: Launcher) -> int | None:
    """The number of processes on this node; ``None`` if it is not known. srun writes ``4(x2),1`` for three nodes."""
    text, node = environment.get(launcher.local_size, ""), environment.get("SLURM_NODEID", "0")
    if text.isdecimal():
        return int(text)
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def _port(job: Iterable[str]) -> int:
    """A port for the job, so that two jobs on one node rarely meet."""
    return _FIRST_PORT + zlib.crc32(" ".join(job).encode()) % _PORTS
