"""How long the exchange of gradients takes by itself, from which follows how much of it the backward pass hides."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist

from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer

_ROUNDS = 3


def seconds_of_reductions(optimizer: DistributedOptimizer, group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds that the reductions of one step take by themselves: the shortest of a few rounds, on the slowest rank. Call
    it before training: it drops all gradients. Collective over ``group``."""
    shortest = math.inf
    for _ in range(_ROUNDS):
        dist.barrier(group)
        _finish(device)
        start = time.perf_counter()
        works = [buffer.reduce_bucket(bucket) for buffer in optimizer.buffers for bucket in buffer.bucket_ids]
        for work in works:
            work.wait()
        _finish(device)
        shortest = min(shortest, time.perf_counter() - start)
    optimizer.zero_grad()
    longest = torch.tensor(shortest, dtype=torch.float64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    return float(longest)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
