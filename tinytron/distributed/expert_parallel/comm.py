"""Dropless dispatch of tokens to experts on other ranks, and the way back (GShard, arXiv:2006.16668; MegaBlocks,
arXiv:2211.15841, for doing it without a capacity).

    [T, D] --copy per choice, sort by expert--> [R, D] --all-to-all--> [Q, D] --sort by local expert--> experts --> back

Letters: T tokens of this rank, k choices per token, R = T k rows sent, Q rows received (differs per rank and step), E
experts of all ranks, e = E / P experts of this rank, P ranks of the group, D model dimension.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tinytron.distributed.exchange import Exchange, all_to_all


class Routes(NamedTuple):
    """Where this micro-batch's rows go: indices on the device, splits on the host."""

    order_R: torch.Tensor  # row of the sorted buffer -> choice (token * k + which choice)
    inverse_R: torch.Tensor  # choice -> row of the sorted buffer
    arrival_Q: torch.Tensor  # row grouped by local expert -> row as received
    arrival_inverse_Q: torch.Tensor
    rows_e: torch.Tensor  # rows of each local expert, int64 on the device
    counts: list[int]  # the same on the host
    send: list[int]  # rows to each rank
    recv: list[int]  # rows from each rank
    top_k: int
    by_triton: bool = False  # rows are summed per token by kernels/expert_rows_triton.py, where that can


def plan_routes(
    expert_Tk: torch.Tensor, num_experts: int, group: dist.ProcessGroup | None, *, by_triton: bool = False
) -> Routes:
    """Agree with the group on who sends how many rows to whom. Collective; the host waits here, once per layer.

    ``expert_Tk``: int64 ``[T, k]``, the experts chosen by each token; ``group`` ``None`` means this process alone. The
    stable sorts keep rows of one expert in token order, so results do not depend on timing.
    """
    size, top_k = dist.get_world_size(group) if group is not None else 1, expert_Tk.shape[1]
    chosen_R = expert_Tk.flatten()
    order_R = torch.argsort(chosen_R, stable=True)
    counts_PE = torch.zeros(num_experts, dtype=torch.int64, device=chosen_R.device)
    counts_PE = counts_PE.scatter_add_(0, chosen_R, torch.ones_like(chosen_R)).view(size, -1)  # [to rank, its expert]
    arriving_Pe = torch.empty_like(counts_PE)  # [from rank, my expert]
    if size > 1:
        dist.all_to_all_single(arriving_Pe, counts_PE, group=group)
    else:
        arriving_Pe = counts_PE
    rows_e = arriving_Pe.sum(0)
    host = torch.cat([counts_PE.sum(1), arriving_Pe.sum(1), rows_e]).tolist()  # the one wait for the device
    send, recv, counts = host[:size], host[size : 2 * size], host[2 * size :]
    # Received rows come rank by rank, and within a rank expert by expert; experts want them expert by expert.
    local = torch.arange(arriving_Pe.shape[1], device=chosen_R.device).repeat(size)
    local_Q = torch.repeat_interleave(local, arriving_Pe.flatten(), output_size=sum(recv))
    arrival_Q = torch.argsort(local_Q, stable=True)
    return Routes(
        order_R, _inverse(order_R), arrival_Q, _inverse(arrival_Q), rows_e, counts, send, recv, top_k, by_triton
    )


class Dispatched(NamedTuple):
    """Rows on their way to the experts."""

    rows: torch.Tensor
    routes: Routes
    exchange: Exchange | None  # None: nobody to exchange with

    def arrive(self) -> torch.Tensor:
        """The rows for this rank's experts, grouped by expert: ``[Q, D]``. Collective, differentiable."""
        if self.exchange is None:
            return self.rows  # sorted by expert already
        rows_QD = self.exchange.finish(self.rows)
        out: torch.Tensor = _Permute.apply(rows_QD, self.routes.arrival_Q, self.routes.arrival_inverse_Q)
        return out


def dispatch(x_TD: torch.Tensor, routes: Routes, group: dist.ProcessGroup | None) -> Dispatched:
    """Send every token ``[T, D]`` to its experts. What is computed before ``arrive`` hides the exchange, in the forward and
    in the backward pass. Collective, differentiable."""
    rows_RD = _CopyToChoices.apply(x_TD, routes.order_R, routes.inverse_R, routes.top_k, _fused(routes.by_triton, x_TD))
    if group is None or len(routes.send) == 1:
        return Dispatched(rows_RD, routes, None)
    exchange = Exchange(group, routes.send, routes.recv)
    return Dispatched(exchange.start(rows_RD), routes, exchange)


def bring_home(rows_QD: torch.Tensor, routes: Routes, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Expert outputs back on the ranks of their tokens, sorted as they were sent: ``[Q, D] -> [R, D]``. Collective,
    differentiable."""
    if group is None or len(routes.send) == 1:
        return rows_QD
    rows_QD = _Permute.apply(rows_QD, routes.arrival_inverse_Q, routes.arrival_Q)
    return all_to_all(rows_QD, group, routes.recv, routes.send)


def weighted_sum(
    rows_RD: torch.Tensor,
    weight_Tk: torch.Tensor,
    order_R: torch.Tensor,
    inverse_R: torch.Tensor,
    by_triton: bool = False,
) -> torch.Tensor:
    """The sum over a token's choices of weight times row, ``[R, D] -> [T, D]``, in the rows' precision; ``order_R``,
    ``inverse_R`` and ``by_triton`` as in ``Routes``.

    Computed in the weights' precision (fp32), rounded once, over a fixed order of choices: no atomics, bit-identical
    repeats. Differentiable; for the backward pass the rows are kept as they are.
    """
    if _fused(by_triton, rows_RD):
        fused: torch.Tensor = _kernels().weighted_sum(rows_RD, weight_Tk, inverse_R)
        return fused
    out: torch.Tensor = _WeightedSum.apply(rows_RD, weight_Tk, order_R, inverse_R)
    return out


def _fused(by_triton: bool, rows: torch.Tensor) -> bool:
    """Whether by kernels/expert_rows_triton.py: not in fp64, and not in what is compiled, where inductor fuses the same."""
    return by_triton and rows.dtype != torch.float64 and not torch.compiler.is_compiling()


def _kernels() -> Any:
    """kernels/expert_rows_triton.py, which needs the triton package."""
    return importlib.import_module("tinytron.kernels.expert_rows_triton")


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


class _Permute(torch.autograd.Function):
    """``rows[index]`` for a permutation; backward gathers with its inverse instead of adding atomically."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows[index]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class _CopyToChoices(torch.autograd.Function):
    """Row ``order[i] // k`` of ``x`` for each sorted row i; backward sums a token's k gradients in a fixed order."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, top_k: int, fused: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.top_k, ctx.fused = top_k, fused
        return x_TD[order_R // top_k]

    @staticmethod
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        if ctx.fused:
            return _kernels().sum_choices(grad_RD, inverse_R, None, ctx.top_k), None, None, None, None
        choices_TkD = grad_RD[inverse_R].view(-1, ctx.top_k, grad_RD.shape[-1])
        wide = torch.promote_types(grad_RD.dtype, torch.float32)
        return choices_TkD.sum(1, dtype=wide).to(grad_RD.dtype), None, None, None, None


class _WeightedSum(torch.autograd.Function):
    """Left to autograd, the rows would be kept in fp32, and gathering them would add atomically in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: torch.Tensor, weight_Tk: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_RD, weight_Tk, order_R, inverse_R)
        choices_TkD = _choices(rows_RD, inverse_R, weight_Tk)
        return (choices_TkD * weight_Tk.unsqueeze(-1)).sum(1).to(rows_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        rows_RD, weight_Tk, order_R, inverse_R = ctx.saved_tensors
        grad_T1D = grad_TD.to(weight_Tk.dtype).unsqueeze(1)
        grad_weight_Tk = (_choices(rows_RD, inverse_R, weight_Tk) * grad_T1D).sum(-1)
        grad_TkD = (grad_T1D * weight_Tk.unsqueeze(-1)).to(rows_RD.dtype)
        return grad_TkD.flatten(0, 1)[order_R], grad_weight_Tk, None, None


def _choices(rows_RD: torch.Tensor, inverse_R: torch.Tensor, weight_Tk: torch.Tensor) -> torch.Tensor:
    """A token's rows side by side, in the weights' precision: ``[T, k, D]``."""
    return rows_RD[inverse_R].view(*weight_Tk.shape, rows_RD.shape[-1]).to(weight_Tk.dtype)
