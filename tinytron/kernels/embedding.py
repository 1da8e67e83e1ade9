"""An embedding lookup whose gradient is summed in fp32."""

from __future__ import annotations

from typing import Any

import torch


def embedding(weight_VD: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The rows ``weight[ids]``: ``[...] -> [..., D]``.

    The gradient is summed in fp32 (or fp64). torch's CPU kernel sums in the weight's precision, and
    in bf16 further occurrences of a token that has occurred 256 times would no longer count.
    """
    rows: torch.Tensor = _Embedding.apply(weight_VD, ids)
    return rows


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = weight_VD.shape[0]
        return weight_VD[ids]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (ids,) = ctx.saved_tensors
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        # The native kernel instead of index_add_, because it is deterministic on CUDA.
        return torch.ops.aten.embedding_dense_backward(wide, ids, ctx.rows, -1, False), None
