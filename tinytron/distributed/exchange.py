"""Differentiable exchanges of rows between ranks: one as an operator, and one that overlaps with other work."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from tinytron.distributed.collectives import Work


def all_to_all(
    rows: torch.Tensor, group: dist.ProcessGroup, send: list[int] | None = None, recv: list[int] | None = None
) -> torch.Tensor:
    """Exchange rows between ranks; the adjoint is the same exchange with the splits swapped.

    Shapes: ``[sum(send), ...] -> [sum(recv), ...]``. ``send[r]`` rows go to rank r, ``recv[r]`` come from it; ``None``
    means equal parts. Collective: all ranks of ``group``, in the same call order. Peers that disagree on a count are not
    detected (gloo silently returns wrong rows): exchange the counts first. Source: GShard, arXiv:2006.16668, section 3.
    """
    out: torch.Tensor = _all_to_all(rows, send or [], recv or [], group.group_name)
    return out


# A custom operator, so that it is a single node of a compiled graph, whose output selective recomputation can keep.
@torch.library.custom_op("tinytron::all_to_all", mutates_args=())
def _all_to_all(rows: torch.Tensor, send: list[int], recv: list[int], group: str) -> torch.Tensor:
    out = _room(rows, send, recv, group)
    joined = _resolve_process_group(group)  # type: ignore[arg-type]  # its parameter was a str until torch 2.12
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
    """An exchange of rows like ``all_to_all`` that overlaps with other work: the computation between ``start`` and
    ``finish`` in the forward pass, and the gradient of that computation in the backward pass. Collective.

    One object serves one exchange. Autograd runs operations in the reverse of the order in which they were recorded. So the
    backward of ``finish``, which starts the exchange of gradients, runs before the gradients of the work in between, and
    the backward of ``start``, which waits for the exchange, runs after them. Differentiable once.
    """

    def __init__(self, group: dist.ProcessGroup, send: list[int], recv: list[int]) -> None:
        self.group, self.send, self.recv = group, send, recv
        self._work: Work | None = None
        self._sent: torch.Tensor | None = None
        self.gradient: torch.Tensor | None = None  # the gradient being received, between the two backward calls

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        """Start sending ``rows``; pass the result, ``[sum(recv), ...]``, to ``finish`` and nothing else."""
        arriving: torch.Tensor = _StartExchange.apply(rows, self)
        return arriving

    def finish(self, arriving: torch.Tensor) -> torch.Tensor:
        """Wait for the exchange and return the received rows."""
        arrived: torch.Tensor = _FinishExchange.apply(arriving, self)
        return arrived

    def start_exchange(self, rows: torch.Tensor, send: list[int], recv: list[int]) -> torch.Tensor:
        """Start an exchange in one direction; the result is valid once ``wait`` has returned."""
        self._sent = rows.contiguous()  # kept alive until the send completes
        out = rows.new_empty(sum(recv), *rows.shape[1:])
        self._work = dist.all_to_all_single(out, self._sent, recv, send, group=self.group, async_op=True)
        return out

    def wait(self) -> None:
        """Wait for the exchange that was started last; on a GPU the stream waits, not the host."""
        if self._work is not None:  # it is None when the memory planner runs this with fake process groups
            self._work.wait()
        self._work = self._sent = None


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.start_exchange(rows, exchange.send, exchange.recv)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.exchange.wait()
        gradient, ctx.exchange.gradient = ctx.exchange.gradient, None
        assert gradient is not None, "the backward of finish starts this exchange"
        return gradient, None


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return arriving.view_as(arriving)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        exchange: Exchange = ctx.exchange
        exchange.gradient = exchange.start_exchange(grad, exchange.recv, exchange.send)
        return grad, None  # a placeholder of the right shape; the backward of start returns the real gradient
