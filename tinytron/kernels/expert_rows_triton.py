"""Triton kernels for the sums of expert_rows.py, each in one pass: experts' rows gathered and summed per token, and the
gradients of that. Needs the triton package.

Sums are in fp32, over a token's choices in order, rounded once and without atomics, so repeated runs are bit-identical.
Letters as in expert_rows.py: T tokens, k choices per token, R = T k rows, D model dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

MAX_BLOCK = 2048  # elements of a row in registers at a time


@triton.jit
def _sum_rows(
    rows: tl.tensor,
    place: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    D: int,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(K):  # unrolled, so that the loads of all choices are in flight at once
        row = tl.load(place + token * K + choice)
        x = tl.load(rows + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= tl.load(weight + token * K + choice)
        total += x
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _spread(
    grad: tl.tensor,
    rows: tl.tensor,
    place: tl.tensor,
    weight: tl.tensor,
    grad_rows: tl.tensor,
    grad_weight: tl.tensor,
    D: int,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # One program per choice. k neighboring programs read a token's gradient, so memory is read only once.
    choice = tl.program_id(0).to(tl.int64)
    row = tl.load(place + choice)
    factor = tl.load(weight + choice)
    grad += choice // K * D
    rows += row * D
    grad_rows += row * D
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < D
        g = tl.load(grad + column, mask=inside, other=0.0).to(tl.float32)
        total += g * tl.load(rows + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_rows + column, (g * factor).to(grad_rows.dtype.element_ty), mask=inside)
    tl.store(grad_weight + choice, tl.sum(total, 0))


def _sizes(D: int) -> dict[str, int]:
    """Block size and number of warps for rows of ``D`` elements: at most 8 elements per thread."""
    block = min(triton.next_power_of_2(D), MAX_BLOCK)
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def sum_choices(
    rows_RD: torch.Tensor, place_R: torch.Tensor, weight_Tk: torch.Tensor | None, top_k: int
) -> torch.Tensor:
    """For each token the sum of its ``top_k`` rows, which are at ``place_R[token * top_k + choice]``, each multiplied
    by its weight (fp32) if given: ``[R, D] -> [T, D]`` in the rows' precision. Not differentiable by itself."""
    R, D = rows_RD.shape
    sizes = _sizes(D)
    out = rows_RD.new_empty(R // top_k, D)
    with torch.cuda.device_of(rows_RD):  # Triton launches on the current device
        _sum_rows[(R // top_k, triton.cdiv(D, sizes["BLOCK"]))](
            rows_RD.contiguous(), place_R, None if weight_Tk is None else weight_Tk.contiguous(), out, D,
            K=top_k, WEIGHTED=weight_Tk is not None, **sizes,
        )  # fmt: skip
    return out


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: torch.Tensor, weight_Tk: torch.Tensor, place_R: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows_RD, weight_Tk, place_R)
        return sum_choices(rows_RD, place_R, weight_Tk, weight_Tk.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows_RD, weight_Tk, place_R = ctx.saved_tensors
        (R, D), k = rows_RD.shape, weight_Tk.shape[1]
        grad_RD = rows_RD.new_empty(R, D)
        grad_Tk = weight_Tk.new_empty(weight_Tk.shape)
        with torch.cuda.device_of(rows_RD):  # Triton launches on the current device
            _spread[(R,)](
                grad_TD.contiguous(), rows_RD.contiguous(), place_R, weight_Tk.contiguous(), grad_RD, grad_Tk, D,
                K=k, **_sizes(D),
            )  # fmt: skip
        return grad_RD, grad_Tk, None


def weighted_sum(rows_RD: torch.Tensor, weight_Tk: torch.Tensor, place_R: torch.Tensor) -> torch.Tensor:
    """``sum_choices`` with weights (fp32), differentiable once in rows and weights: ``[R, D] -> [T, D]``.

    ``place_R`` is a permutation. The backward pass keeps the rows in their own precision, not in fp32.
    """
    out: torch.Tensor = _WeightedSum.apply(rows_RD, weight_Tk, place_R)
    return out
