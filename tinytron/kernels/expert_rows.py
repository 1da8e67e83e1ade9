"""Operations on the rows of experts on one rank: copying tokens to their choices, permuting rows, summing choices.

Each function has a hand-written backward pass. In autograd's, gathers would add atomically, and rows would be kept
in fp32. Sums run over a token's choices in order, so repeated runs are bit-identical. With ``triton``,
expert_rows_triton.py does each in one pass; it is not used for fp64, nor in compiled code, where inductor fuses
the same operations.

Letters: T tokens, k choices per token, R = T k rows, D model dimension. ``order_R`` maps a row to its choice
(token * k + number of the choice), and ``inverse_R`` a choice to its row.
"""

from __future__ import annotations

from typing import Any

import torch

from tinytron.kernels.choice import TritonKernel


def copy_to_choices(
    x_TD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, top_k: int, by: TritonKernel = "torch"
) -> torch.Tensor:
    """The token of every row: ``[T, D] -> [R, D]``. The gradient is summed in fp32 (or fp64)."""
    rows_RD: torch.Tensor = _CopyToChoices.apply(x_TD, order_R, inverse_R, top_k, _fused(by, x_TD))
    return rows_RD


def permute(rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """``rows[index]`` for a permutation ``index`` and its ``inverse``."""
    out: torch.Tensor = _Permute.apply(rows, index, inverse)
    return out


def weighted_sum(
    rows_RD: torch.Tensor,
    weight_Tk: torch.Tensor,
    order_R: torch.Tensor,
    inverse_R: torch.Tensor,
    by: TritonKernel = "torch",
) -> torch.Tensor:
    """Sum over a token's choices of weight times row: ``[R, D] -> [T, D]``, in the rows' precision.

    The sum is computed in the weights' precision (fp32) and rounded once. The rows are kept for the backward pass
    in their own precision.
    """
    if _fused(by, rows_RD):
        from tinytron.kernels import expert_rows_triton  # needs the triton package

        return expert_rows_triton.weighted_sum(rows_RD, weight_Tk, inverse_R)
    out: torch.Tensor = _WeightedSum.apply(rows_RD, weight_Tk, order_R, inverse_R)
    return out


def _fused(by: TritonKernel, rows: torch.Tensor) -> bool:
    """True if our Triton kernel computes this call."""
    return by == "triton" and rows.dtype != torch.float64 and not torch.compiler.is_compiling()


class _CopyToChoices(torch.autograd.Function):
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
            from tinytron.kernels import expert_rows_triton  # needs the triton package

            return expert_rows_triton.sum_choices(grad_RD, inverse_R, None, ctx.top_k), None, None, None, None
        choices_TkD = grad_RD[inverse_R].view(-1, ctx.top_k, grad_RD.shape[-1])
        wide = torch.promote_types(grad_RD.dtype, torch.float32)
        return choices_TkD.sum(1, dtype=wide).to(grad_RD.dtype), None, None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows[index]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class _WeightedSum(torch.autograd.Function):
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
