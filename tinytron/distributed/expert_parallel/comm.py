"""Dropless dispatch of tokens to experts on other ranks, and the way back. Sources: GShard (arXiv:2006.16668), and
MegaBlocks (arXiv:2211.15841) for dispatch without a capacity limit.

    [T, D] --copy per choice, sort by expert--> [R, D] --all-to-all--> [Q, D] --sort by local expert--> experts --> back

Letters: T tokens of this rank, k choices per token, R = T k rows sent, Q rows received (differs per rank and step), E
experts of all ranks, e = E / P experts of this rank, P ranks in the group, D model dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from tinytron.distributed.exchange import Exchange, all_to_all
from tinytron.kernels.choice import TritonKernel
from tinytron.kernels.expert_rows import copy_to_choices, permute


class DispatchPlan(NamedTuple):
    """The routes of a micro-batch's rows: indices on the device, splits on the host."""

    order_R: torch.Tensor  # row of the sorted buffer -> choice (token * k + number of the choice)
    inverse_R: torch.Tensor  # choice -> row of the sorted buffer
    arrival_Q: torch.Tensor  # row grouped by local expert -> row as received
    arrival_inverse_Q: torch.Tensor
    rows_e: torch.Tensor  # rows of each local expert, int64 on the device
    counts: list[int]  # rows_e on the host
    send: list[int]  # rows to each rank
    recv: list[int]  # rows from each rank
    top_k: int


def plan_dispatch(expert_Tk: torch.Tensor, num_experts: int, group: dist.ProcessGroup | None) -> DispatchPlan:
    """Agree with the group on the number of rows that each rank sends to each other rank. Collective; the host waits for
    the device here, once per layer.

    ``expert_Tk``: int64 ``[T, k]``, the experts chosen by each token; ``group`` ``None`` means this process alone. The
    stable sorts keep rows of one expert in token order, so results do not depend on timing.
    """
    size = dist.get_world_size(group) if group is not None else 1
    top_k = expert_Tk.shape[1]
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
    host = torch.cat([counts_PE.sum(1), arriving_Pe.sum(1), rows_e]).tolist()  # the only wait for the device
    send, recv, counts = host[:size], host[size : 2 * size], host[2 * size :]
    # Received rows are ordered by rank and then by expert; the experts need them ordered by expert.
    local = torch.arange(arriving_Pe.shape[1], device=chosen_R.device).repeat(size)
    local_Q = torch.repeat_interleave(local, arriving_Pe.flatten(), output_size=sum(recv))
    arrival_Q = torch.argsort(local_Q, stable=True)
    return DispatchPlan(order_R, _inverse(order_R), arrival_Q, _inverse(arrival_Q), rows_e, counts, send, recv, top_k)


class Dispatched(NamedTuple):
    """Rows that are being sent to the experts."""

    rows: torch.Tensor
    routes: DispatchPlan
    exchange: Exchange | None  # None without other ranks

    def wait(self) -> torch.Tensor:
        """Wait for the rows of this rank's experts, ``[Q, D]``, grouped by expert. Collective, differentiable."""
        if self.exchange is None:
            return self.rows  # already sorted by expert
        rows_QD = self.exchange.finish(self.rows)
        return permute(rows_QD, self.routes.arrival_Q, self.routes.arrival_inverse_Q)


def dispatch(
    x_TD: torch.Tensor, routes: DispatchPlan, group: dist.ProcessGroup | None, by: TritonKernel = "torch"
) -> Dispatched:
    """Send every token ``[T, D]`` to its experts. Work done before ``Dispatched.wait`` overlaps with the exchange, in the
    forward and in the backward pass. ``by`` is the kernel that sums the gradients of a token's rows. Collective,
    differentiable."""
    rows_RD = copy_to_choices(x_TD, routes.order_R, routes.inverse_R, routes.top_k, by)
    if group is None or len(routes.send) == 1:
        return Dispatched(rows_RD, routes, None)
    exchange = Exchange(group, routes.send, routes.recv)
    return Dispatched(exchange.start(rows_RD), routes, exchange)


def combine(rows_QD: torch.Tensor, routes: DispatchPlan, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Send expert outputs back to the ranks of their tokens, in the order in which the rows were sent:
    ``[Q, D] -> [R, D]``. Collective, differentiable."""
    if group is None or len(routes.send) == 1:
        return rows_QD
    rows_QD = permute(rows_QD, routes.arrival_inverse_Q, routes.arrival_Q)
    return all_to_all(rows_QD, group, routes.recv, routes.send)


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse
