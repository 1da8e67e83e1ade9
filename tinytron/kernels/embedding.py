"""The rows of a table, with a gradient that is summed in fp32."""

from __future__ import annotations

from typing import Any

import torch


def embedding(weight_VD: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``weight[ids]``: ``[...] -> [..., D]``.

    Its gradient is summed in fp32 (fp64): torch's CPU kernel sums in the weight's own precision, and in
    bf16 a token that occurs 256 times stops counting.
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
        # The native kernel rather than index_add_: it is deterministic on CUDA.
        return torch.ops.aten.embedding_dense_backward(wide, ids, ctx.rows, -1, False), None
