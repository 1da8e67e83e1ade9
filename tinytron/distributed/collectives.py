"""Sums over ranks, and agreement: an error on one rank becomes the same error on all, so that nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from tinytron.errors import TinytronError

T = TypeVar("T")

# torch 2.13 gave the flat-tensor collectives new names and deprecated the old ones.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Waitable(Protocol):
    """An exchange under way."""

    def wait(self) -> Any:
        """Make its results usable by what comes next on this device."""


class _Together:
    """Several exchanges, waited for as one."""

    def __init__(self, works: Sequence[Waitable]) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class SummedExchange:
    """A reduce-scatter out of messages: every rank sends each other one its part, and sums what arrives.

    Parts travel in ``wire_dtype`` and are summed in ``own``'s precision, peers in rank order: nothing is rounded between
    hops. On gloo it costs about a third of the native reduce-scatter, which also copies the whole buffer first.
    """

    def __init__(
        self, own: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup, wire_dtype: torch.dtype
    ) -> None:
        self.own_N, self.whole_WN, self.group = own, whole.view(dist.get_world_size(group), -1), group
        self.wire_dtype = wire_dtype
        self.peers = [r for r in range(len(self.whole_WN)) if r != dist.get_rank(group)]
        self._parts: list[torch.Tensor] = []
        self._sent: list[torch.Tensor] = []
        self._work: Waitable = _Together([])

    def start(self) -> SummedExchange:
        """Send this rank's parts, and expect the others' parts of ``own``."""
        # On a CPU the memory is kept: writing into new pages takes longer than the sum.
        if not self._parts or self.own_N.device.type != "cpu":
            self._parts = [torch.empty_like(self.own_N, dtype=self.wire_dtype) for _ in self.peers]
        self._sent = [self.whole_WN[r].to(self.wire_dtype) for r in self.peers]  # alive until they are gone
        self._work = _exchange([*zip(self.peers, self._sent, self._parts, strict=True)], self.group)
        return self

    def wait(self) -> None:
        """Sum: ``own`` then holds the total."""
        self._work.wait()
        self._sent = []
        for part in self._parts:
            self.own_N += part


def _exchange(messages: Sequence[tuple[int, torch.Tensor, torch.Tensor]], group: dist.ProcessGroup) -> Waitable:
    """Start one message to and one from each peer: (its rank in ``group``, what it gets, where its own goes)."""
    operations = []
    for peer, sent, received in messages:
        operations.append(dist.P2POp(dist.isend, sent, group=group, group_peer=peer))
        operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=peer))
    return _Together(dist.batch_isend_irecv(operations) if operations else [])


def start_reduce_scatter(own: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup) -> Waitable:
    """Start summing ``whole`` (1-D) over ``group``; ``own``, this rank's range of it, holds the sum once waited for."""
    work: Waitable = _reduce_scatter(own, whole, op=dist.ReduceOp.SUM, group=group, async_op=True)
    return work


def start_all_reduce(whole: torch.Tensor, group: dist.ProcessGroup) -> Waitable:
    """Start summing ``whole`` in place over ``group``."""
    work: Waitable = dist.all_reduce(whole, op=dist.ReduceOp.SUM, group=group, async_op=True)
    return work


def start_all_gather(whole: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> Waitable:
    """Start collecting every rank's ``own`` range into ``whole``, of which it is a view.

    On gloo by messages, which need no copies of the buffer and take about 2/3 of the time.
    """
    if dist.get_backend(group) != "nccl":
        parts = list(enumerate(whole.view(dist.get_world_size(group), -1)))
        return _exchange([(r, own, part) for r, part in parts if r != dist.get_rank(group)], group)
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


def together_long(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """``together`` for an ``action`` that may take longer than a collective's timeout, such as a download: it runs in a
    thread, while the ranks tell each other every second that they are alive."""
    with ThreadPoolExecutor(1) as pool:
        job, all_done = pool.submit(action), [False]
        while not all(all_done):
            wait([job], timeout=1.0)
            all_done = [False] * dist.get_world_size(group)
            dist.all_gather_object(all_done, job.done(), group=group)
    return together(job.result, group)


def all_to_all(
    rows: torch.Tensor, group: dist.ProcessGroup, send: list[int] | None = None, recv: list[int] | None = None
) -> torch.Tensor:
    """Exchange rows between ranks; the adjoint is the same exchange with the splits swapped.

    Shapes: ``[sum(send), ...] -> [sum(recv), ...]``. ``send[r]`` rows go to rank r, ``recv[r]`` come from it; ``None``
    means equal parts. Collective: all ranks of ``group``, in the same call order. Peers that disagree on a count are not
    caught (gloo returns wrong rows in silence): exchange the counts first. Source: GShard, arXiv:2006.16668, section 3.
    """
    out: torch.Tensor = _all_to_all(rows, send or [], recv or [], group.group_name)
    return out


# An operator of our own: one step of a compiled graph, which selective recomputation can keep.
@torch.library.custom_op("tinytron::all_to_all", mutates_args=())
def _all_to_all(rows: torch.Tensor, send: list[int], recv: list[int], group: str) -> torch.Tensor:
    out = _room(rows, send, recv, group)
    joined = _resolve_process_group(group)  # type: ignore[arg-type]  # a str until torch 2.12
    dist.all_to_all_single(out, rows.contiguous(), recv or None, send or None, group=joined)
    return out


@_all_to_all.register_fake
def _room(rows: torch.Tensor, send: list[int], recv: list[int], group: str) -> torch.Tensor:
    return rows.new_empty(sum(recv) if recv else rows.shape[0], *rows.shape[1:])


def _keep_splits(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.send, ctx.recv, ctx.group = inputs


def _exchange_back(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return _all_to_all(grad, ctx.recv, ctx.send, ctx.group), None, None, None


_all_to_all.register_autograd(_exchange_back, setup_context=_keep_splits)


class Exchange:
    """An exchange of rows like ``all_to_all``, started here and waited for later, so that other work hides it: what is
    computed between ``start`` and ``finish``, and in the backward pass the gradient of just that. Collective.

    One object serves one exchange. Autograd runs what was recorded last first; so the gradient of ``finish``, which
    starts the way back, comes before the gradients of what lies between, and that of ``start``, which waits, after them.
    Differentiable once.
    """

    def __init__(self, group: dist.ProcessGroup, send: list[int], recv: list[int]) -> None:
        self.group, self.send, self.recv = group, send, recv
        self._work: Waitable | None = None
        self._sent: torch.Tensor | None = None
        self.gradient: torch.Tensor | None = None  # on its way back

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        """Send ``rows``; the result, ``[sum(recv), ...]``, is for ``finish`` only."""
        arriving: torch.Tensor = _StartExchange.apply(rows, self)
        return arriving

    def finish(self, arriving: torch.Tensor) -> torch.Tensor:
        """What has arrived."""
        arrived: torch.Tensor = _FinishExchange.apply(arriving, self)
        return arrived

    def depart(self, rows: torch.Tensor, send: list[int], recv: list[int]) -> torch.Tensor:
        """Start one way; the result is filled once ``land`` was called."""
        self._sent = rows.contiguous()  # alive until it is gone
        out = rows.new_empty(sum(recv), *rows.shape[1:])
        self._work = dist.all_to_all_single(out, self._sent, recv, send, group=self.group, async_op=True)
        return out

    def land(self) -> None:
        """Wait for what was started last; on a GPU the stream waits, not the host."""
        if self._work is not None:  # it is where a plan only pretends to send
            self._work.wait()
        self._work = self._sent = None


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.depart(rows, exchange.send, exchange.recv)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.exchange.land()
        gradient, ctx.exchange.gradient = ctx.exchange.gradient, None
        assert gradient is not None, "finish starts its exchange"
        return gradient, None


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        exchange.land()
        return arriving.view_as(arriving)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        exchange: Exchange = ctx.exchange
        exchange.gradient = exchange.depart(grad, exchange.recv, exchange.send)
        return grad, None  # of the right shape; the real one is on its way
