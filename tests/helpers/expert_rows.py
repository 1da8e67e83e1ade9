"""Dispatch and combine in one call each."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tinytron.distributed.expert_parallel import comm
from tinytron.distributed.expert_parallel.comm import DispatchPlan
from tinytron.kernels.choice import TritonKernel
from tinytron.kernels.expert_rows import weighted_sum


def dispatch(
    x_TD: torch.Tensor, routes: DispatchPlan, group: dist.ProcessGroup | None, by: TritonKernel = "torch"
) -> torch.Tensor:
    """Rows for this rank's experts, with nothing computed on their way: ``[T, D] -> [Q, D]``."""
    return comm.dispatch(x_TD, routes, group, by).wait()


def combine(
    rows_QD: torch.Tensor,
    weight_Tk: torch.Tensor,
    routes: DispatchPlan,
    group: dist.ProcessGroup | None,
    by: TritonKernel = "torch",
) -> torch.Tensor:
    """Expert outputs brought home and summed per token: ``[Q, D] -> [T, D]``."""
    rows_RD = comm.combine(rows_QD, routes, group)
    return weighted_sum(rows_RD, weight_Tk, routes.order_R, routes.inverse_R, by)
