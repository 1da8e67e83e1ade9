"""Sums over ranks, and agreement: an error on one rank becomes the same error on all, so that nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tinytron.errors import TinytronError

T = TypeVar("T")

# torch 2.13 gave the flat-tensor collectives new names and deprecated the old ones.
reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum ``tensor`` in place over ``group`` and return it. Collective."""
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def together(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Run ``action`` on every rank of ``group``; if it raises a ``TinytronError`` or ``OSError`` anywhere, every rank
    raises the error of the lowest such rank. Collective.

    For whatever depends on a machine's files or environment: without it the healthy ranks would wait in their next
    collective for the one that stopped.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except (TinytronError, OSError) as caught:
        error = caught
    errors: list[Exception | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise first if isinstance(first, TinytronError) else TinytronError(str(first))
    return result  # type: ignore[return-value]
