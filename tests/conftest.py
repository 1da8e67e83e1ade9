"""Fixtures of all tests: threads pinned, and the live ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.storage import s3, s3_server, storage  # noqa: F401

# A shell without job control starts jobs in the background with Ctrl-C ignored, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start
torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anything imports triton: our kernels then run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """``ranks(world)`` is the pool of ``world`` gloo processes of this pytest run."""
    pools: dict[int, Ranks] = {}
    folder = tmp_path_factory.mktemp("rendezvous")

    def pool(world: int) -> Ranks:
        if world not in pools:
            pools[world] = Ranks(world, folder)
        return pools[world]

    yield pool
    for made in pools.values():
        made.close(kill=True)
