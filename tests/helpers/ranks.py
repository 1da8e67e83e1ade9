"""A pool of live gloo ranks, started once per pytest run (seconds), then 0.05 s a test.

A failing rank's traceback fails the test, ranks that die or do not answer are named, and a pool in which anything went
wrong is thrown away. Sound because nothing in the library is global: a job leaves nothing behind for the next one.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tinytron.utils import profile

START_SECONDS = 240.0  # much on a busy machine: every rank imports torch
Job = Callable[..., Any]
MANY_THREADS = 100
Answer = tuple[int, Any, str | None]  # rank, result, traceback


def _serve(rank: int, world: int, rendezvous: str, inbox: mp.Queue[Any], outbox: mp.Queue[Answer]) -> None:
    mp.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have loader workers
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine
    torch.set_num_threads(1)  # the ranks share two cores
    profile.measured_matmul_rate = lambda *_, **__: 1e12  # for MFU: 0.3 s of matmuls at every start of training
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    outbox.put((rank, "ready", None))
    while (job := inbox.get()) is not None:
        fn, args = job
        torch.manual_seed(0)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                result = fn(*args)
            outbox.put((rank, result, None))
        except BaseException:
            outbox.put((rank, None, traceback.format_exc() + printed.getvalue()))
        _destroy_subgroups()
    dist.destroy_process_group()


def _destroy_subgroups() -> None:
    """Every gloo group owns sockets and threads; a run makes hundreds. Trainers are in reference cycles (hooks), so the
    groups they hold live until they are collected."""
    world = dist.group.WORLD
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not world:
            dist.destroy_process_group(group)
    if len(os.listdir("/proc/self/task")) > MANY_THREADS:
        gc.collect()


class Ranks:
    """``world`` processes that run ``fn(*args)`` together and return the list of their results.

    ``fn`` must be a function at module level; results are best plain values or numpy arrays. Started by the first
    ``run``; started anew by the next one after a failure.
    """

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.folder, self.generation = world, folder, 0
        self.processes: list[mp.Process] = []

    def run(self, fn: Job, *args: Any, timeout: float = 60) -> list[Any]:
        """Results of all ranks, in order. Raises: AssertionError with a failing rank's traceback, or naming the ranks
        that died or were silent for ``timeout`` seconds; the pool is killed then."""
        try:
            if not self.processes:
                self._start()
                self._collect("start", START_SECONDS)
            for inbox in self.inboxes:
                inbox.put((fn, args))
            answers = self._collect(fn.__name__, timeout)
        except BaseException:
            self.close(kill=True)
            raise
        return [answers[rank] for rank in range(self.world)]

    def _start(self) -> None:
        context = mp.get_context("spawn")  # fork is unsafe once torch has threads
        self.generation += 1
        self.inboxes = [context.Queue() for _ in range(self.world)]
        self.outbox = context.Queue()
        rendezvous = f"file://{self.folder}/world{self.world}_{self.generation}"
        self.processes = [
            context.Process(target=_serve, args=(r, self.world, rendezvous, self.inboxes[r], self.outbox), daemon=True)
            for r in range(self.world)
        ]
        for process in self.processes:
            process.start()

    def _collect(self, name: str, timeout: float) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.world:
            try:
                rank, value, error = self.outbox.get(timeout=0.5)
            except queue.Empty:
                dead = [r for r, p in enumerate(self.processes) if not p.is_alive() and r not in answers]
                assert not dead, f"{name}: ranks {dead} of {self.world} died"
                silent = sorted(set(range(self.world)) - set(answers))
                assert time.monotonic() < deadline, (
                    f"{name}: ranks {silent} of {self.world} were silent for {timeout:g} s, {sorted(answers)} answered"
                )
                continue
            assert error is None, self._failure(name, rank, error)
            answers[rank] = value
        return answers

    def _failure(self, name: str, rank: int, error: str) -> str:
        time.sleep(0.2)  # a rank that died takes its peers' connections with it: then it is the one to name first
        dead = [r for r, p in enumerate(self.processes) if not p.is_alive()]
        died = f"ranks {dead} of {self.world} died; " if dead else ""
        return f"{name}: {died}rank {rank} of {self.world}:\n{error}"

    def close(self, *, kill: bool = False) -> None:
        """End the processes: they finish what they are doing, or with ``kill`` not even that."""
        for rank, process in enumerate(self.processes):
            if kill:
                process.kill()
            else:
                self.inboxes[rank].put(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self.processes = []
