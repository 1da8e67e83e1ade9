"""Fixtures of all tests: threads pinned, and the live ranks."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from tests.helpers import forks
from tests.helpers.ranks import Ranks
from tests.helpers.storage import s3, s3_server, storage  # noqa: F401

# A shell without job control starts jobs in the background with Ctrl-C ignored, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start
torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anything imports triton: our kernels then run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"
    if sys.platform == "linux" and os.environ.get("TINYTRON_TESTS_FORK") != "0":  # and a fork could not use CUDA
        forks.install(forks.Server(dict(os.environ)))


@pytest.hookimpl(tryfirst=True)  # before -m picks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow all but n cells of a test with ``@pytest.mark.sample(n)``. The n are drawn by their names: the same ones
    everywhere, and likely to have every value of every parameter among them."""
    cells: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("slow"):
            cells.setdefault(item.nodeid.split("[")[0], []).append(item)
    for of_test in cells.values():
        mark = of_test[0].get_closest_marker("sample")
        assert mark is not None, "collected by it"
        drawn = sorted(of_test, key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
        for item in drawn[mark.args[0] :]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def real_processes() -> Iterator[None]:
    """For tests of how a process starts: nothing that they start is a fork (see ``helpers/forks.py``)."""
    with forks.real_processes():
        yield


@pytest.fixture(autouse=True)
def no_world_is_left_behind() -> Iterator[None]:
    """A trainer that a test makes in this process joins a world, in which other tests must not find themselves."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


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
