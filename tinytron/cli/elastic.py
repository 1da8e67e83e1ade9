"""Runs that lose nodes and get them back: ``tinytron launch --nnodes MIN:MAX`` (docs/reliability.md).

torchrun's agents do most of it: the workers of the remaining nodes fail, the agents meet again, and start workers with
other ranks, which continue from the last checkpoint. This file adds three things: a node that is asked to leave does so
while the others continue, a user's error is not repeated, and workers that make room for a new node get time to save.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.agent.server.api import SimpleElasticAgent, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext

from tinytron.errors import ConfigError

SAVING_SECONDS = 600  # from SIGTERM to SIGKILL for workers that save to make room for a new node
Restart = Callable[[Any, WorkerGroup], None]


def numbers_of_nodes(nnodes: str) -> tuple[int, int]:
    """The least and the most nodes that ``--nnodes`` N or MIN:MAX allows. Raises: ConfigError."""
    least, colon, most = nnodes.partition(":")
    parts = (least, most if colon else least)
    numbers = [int(part) for part in parts if part.isascii() and part.isdecimal()]
    if len(numbers) != len(parts) or not 1 <= numbers[0] <= numbers[1]:
        raise ConfigError(
            f"--nnodes {nnodes} (PET_NNODES) must be a number of nodes of at least 1, or MIN:MAX with 1 <= MIN <= MAX; use "
            "--nnodes 2, or --nnodes 1:2 for a run that may lose nodes"
        )
    return numbers[0], numbers[1]


def is_elastic(args: argparse.Namespace) -> bool:
    """True if ``--nnodes`` is a range. Raises: ConfigError for options that do not go with it."""
    least, most = numbers_of_nodes(str(args.nnodes))
    if least == most:
        return False
    if args.standalone or args.rdzv_backend == "static" or not args.rdzv_endpoint:
        raise ConfigError(
            f"--nnodes {args.nnodes} needs a place where nodes can meet again; add --rdzv_backend c10d --rdzv_id NAME "
            "--rdzv_endpoint HOST:29400, with the name of a node that stays"
        )
    if args.max_restarts < 1:
        raise ConfigError(
            f"--nnodes {args.nnodes} restarts the run when a node is lost, but --max_restarts is {args.max_restarts}; use "
            "the number of losses to survive, such as --max_restarts 10"
        )
    return True


def make_elastic(workers: Callable[[], PContext | None], leave_if_asked: Callable[[], None], user_error: int) -> None:
    """Change torchrun's agents of this process. ``workers`` returns the current workers, ``leave_if_asked`` raises if this
    node was asked to stop, and ``user_error`` is the exit status of a worker whose user made a mistake."""
    restart: Restart = SimpleElasticAgent._restart_workers

    def restart_workers(agent: SimpleElasticAgent, group: WorkerGroup) -> None:
        leave_if_asked()  # before this node meets the others again, who would wait for it
        if user_error in _statuses(workers()):
            sys.exit(user_error)
        restart(agent, group)

    def stop_workers(agent: LocalElasticAgent, group: WorkerGroup) -> None:
        agent._shutdown(signal.SIGTERM, SAVING_SECONDS)

    SimpleElasticAgent._restart_workers = restart_workers  # type: ignore[method-assign]
    LocalElasticAgent._stop_workers = stop_workers  # type: ignore[method-assign]


def _statuses(workers: PContext | None) -> set[int | None]:
    handlers = getattr(workers, "subprocess_handlers", None) or {}
    return {handler.proc.returncode for handler in handlers.values()}
