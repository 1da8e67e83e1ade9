"""Sums over ranks, and agreement: an error on one rank becomes the same error on all, so that nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from tinytron.errors import TinytronError

T = TypeVar("T")

# torch 2.13 gave the flat-tensor collectives new names and deprecated the old ones.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Waitable(Protocol):
    """An exchange under way."""

    def wait(self) -> Any:
        """Make its results usable by what comes next on this device."""


class _SummedExchange:
    """An all-to-all whose parts are summed on arrival."""

    def __init__(self, work: Waitable, parts_WN: torch.Tensor, out_N: torch.Tensor) -> None:
        self.work, self.parts_WN, self.out_N = work, parts_WN, out_N

    def wait(self) -> None:
        self.work.wait()
        torch.sum(self.parts_WN, dim=0, dtype=self.out_N.dtype, out=self.out_N)


def start_reduce_scatter(
    own: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup, wire_dtype: torch.dtype | None = None
) -> Waitable:
    """Start summing ``whole`` (1-D) over ``group``; ``own``, this rank's range of it, holds the sum once waited for.

    With ``wire_dtype``, and on gloo always, parts travel by all-to-all and are summed here in ``own``'s precision and
    rank order: nothing is rounded on the way, and on gloo it is about 3x as fast (3.1 against 1.0 GB/s at 16 MiB).
    """
    if wire_dtype is None and dist.get_backend(group) == "nccl":
        native: Waitable = _reduce_scatter(own, whole, op=dist.ReduceOp.SUM, group=group, async_op=True)
        return native
    send = whole if wire_dtype is None else whole.to(wire_dtype)
    parts = torch.empty_like(send)
    work: Waitable = dist.all_to_all_single(parts, send, group=group, async_op=True)
    return _SummedExchange(work, parts.view(dist.get_world_size(group), -1), own)


def start_all_reduce(whole: torch.Tensor, group: dist.ProcessGroup) -> Waitable:
    """Start summing ``whole`` in place over ``group``."""
    work: Waitable = dist.all_reduce(whole, op=dist.ReduceOp.SUM, group=group, async_op=True)
    return work


def start_all_gather(whole: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> Waitable:
    """Start collecting every rank's ``own`` range into ``whole`` (of which it may be a view)."""
    work: Waitable = _all_gather(whole, own, group=group, async_op=True)
    return work


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


class AllToAll(torch.autograd.Function):
    """Exchange rows between ranks; the adjoint is the same exchange with the splits swapped.

    Shapes: ``[sum(send), ...] -> [sum(recv), ...]``. ``send[r]`` rows go to rank r, ``recv[r]`` come from it; ``None``
    means equal parts. Collective: all ranks of ``group``, in the same call order. Peers that disagree on a count are not
    caught (gloo returns wrong rows in silence): exchange the counts first. Source: GShard, arXiv:2006.16668, section 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        group: dist.ProcessGroup,
        send: list[int] | None,
        recv: list[int] | None,
    ) -> torch.Tensor:
        ctx.group, ctx.send, ctx.recv = group, send, recv
        out = rows.new_empty(rows.shape[0] if recv is None else sum(recv), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), recv, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        exchanged: torch.Tensor = AllToAll.apply(grad, ctx.group, ctx.recv, ctx.send)
        return exchanged, None, None, None
