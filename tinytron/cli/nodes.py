"""The nodes of a job: how many there are, which one this is, and where they meet, as schedulers tell each node."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from tinytron.errors import ConfigError

_PORT = 29500
# Our variable, the one of platforms that talk to torchrun (Kubeflow), and the value without either.
_VARIABLES = {
    "NUM_NODES": ("PET_NNODES", "1"),
    "NODE_RANK": ("PET_NODE_RANK", "0"),
    "MASTER_PORT": ("PET_MASTER_PORT", str(_PORT)),
}


@dataclass(frozen=True)
class Nodes:
    """``count`` nodes, of which this is number ``rank``; they meet at ``host`` (the first of them) and ``port``."""

    count: int = 1
    rank: int = 0
    host: str = "localhost"
    port: int = _PORT

    @property
    def first(self) -> bool:
        """True on the node that writes what is written once."""
        return self.rank == 0

    @property
    def rendezvous(self) -> list[str]:
        """The flags of ``tinytron launch`` by which the nodes find each other."""
        if self.count == 1:
            return ["--standalone"]
        place = ["--master_addr", self.host, "--master_port", str(self.port)]
        return ["--nnodes", str(self.count), "--node_rank", str(self.rank), *place]


def nodes_of(environment: Mapping[str, str] | None = None) -> Nodes:
    """The nodes that ``NUM_NODES``, ``NODE_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` describe (or ``PET_NNODES`` and so
    on; default: the environment of this process). Raises: ConfigError for values that are not a place among nodes."""
    env = os.environ if environment is None else environment
    ours = "NUM_NODES" in env
    count, rank, port = (_number(env, name, platform=not ours) for name in _VARIABLES)
    if count < 1:
        raise ConfigError(f"NUM_NODES={count} must be at least 1; use NUM_NODES=1 on one machine")
    if rank >= count:
        raise ConfigError(f"NODE_RANK={rank} must be below NUM_NODES={count}; number the nodes from 0, as NODE_RANK=0")
    host = env.get("MASTER_ADDR") or (None if ours else env.get("PET_MASTER_ADDR"))
    if host is None and count > 1:
        raise ConfigError(
            f"NUM_NODES={count} nodes need the address of the first one; set MASTER_ADDR, such as MASTER_ADDR=10.0.0.1"
        )
    return Nodes(count, rank, host or "localhost", port)


def _number(env: Mapping[str, str], name: str, *, platform: bool) -> int:
    other, default = _VARIABLES[name]
    if name not in env and platform and other in env:
        name = other
    text = env.get(name, default)
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"environment variable {name}={text!r} must be a whole number; use {name}={default}")
    return int(text)
