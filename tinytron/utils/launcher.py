"""What launchers tell a process about its place, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping

# The process's number on its node, as torchrun, srun, Open MPI and Intel MPI call it.
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


def local_rank_variable(environment: Mapping[str, str]) -> str:
    """The variable of ``environment`` with this process's number on its node: ``LOCAL_RANK``, or that of another launcher
    if a script has set ``RANK`` only. Without one, all processes of a node would take its first GPU."""
    names = _LOCAL_RANKS if "RANK" in environment else _LOCAL_RANKS[:1]
    return next((name for name in names if name in environment), _LOCAL_RANKS[0])
