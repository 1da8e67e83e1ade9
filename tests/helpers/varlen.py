"""Torch's operators behind ``varlen_attn``, which has kernels on GPUs only, in plain torch on the CPU. All else is torch's:
the function itself, its checks, what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def _weights(
    q_TNH: torch.Tensor, k_TNH: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, window: Sequence[int]
) -> torch.Tensor:
    """Attention weights ``[N, T, T]``: token i of a document sees i - left .. i + right of it, ends included, -1 being no
    end; ``causal`` means right = 0."""
    left, right = window
    token = torch.arange(len(q_TNH))
    document = torch.bucketize(token, cu_seqlens, right=True)
    ahead = token[None, :] - token[:, None]  # of the query (row), how far the key (column) is
    seen = document[None, :] == document[:, None]
    if causal or right >= 0:
        seen &= ahead <= (0 if causal else right)
    if left >= 0:
        seen &= -ahead <= left
    scores = torch.einsum("snh,tnh->nst", q_TNH, k_TNH) * q_TNH.shape[-1] ** -0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def _one_each(x_TKH: torch.Tensor, N: int) -> torch.Tensor:
    return x_TKH.repeat_interleave(N // x_TKH.shape[1], dim=1)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor) -> None:
    """What the kernels ask for."""
    assert q.ndim == k.ndim == v.ndim == 3
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for cu in (cu_q, cu_k):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert (int(cu[0]), int(cu[-1])) == (0, len(q))
    assert q.shape[1] % k.shape[1] == 0


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, window_size: Sequence[int] | None = None, *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    _check(q, k, v, cu_q, cu_k)
    assert max_q == max_k >= int(cu_q.diff().max())  # a bound: a captured step has the same for all documents
    N = q.shape[1]
    weights = _weights(q, _one_each(k, N), cu_q, is_causal, window_size or (-1, -1))
    out = torch.einsum("nst,tnh->snh", weights, _one_each(v, N)).contiguous()
    return out, q.new_zeros(N, len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int, is_causal: bool, rng: torch.Tensor,
    scale: float | None = None, window_size: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """By hand: below autograd nothing records."""
    _check(q, k, v, cu_q, cu_k)
    (_, N, H), K = q.shape, k.shape[1]
    wide_k, wide_v = _one_each(k, N), _one_each(v, N)
    weights = _weights(q, wide_k, cu_q, is_causal, window_size or (-1, -1))
    of_weights = torch.einsum("snh,tnh->nst", grad, wide_v)
    scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * H**-0.5
    grad_k = torch.einsum("nst,snh->tnh", scores, q).unflatten(1, (K, -1)).sum(2)
    grad_v = torch.einsum("nst,snh->tnh", weights, grad).unflatten(1, (K, -1)).sum(2)
    return torch.einsum("nst,tnh->snh", scores, wide_k).contiguous(), grad_k, grad_v


@contextmanager
def varlen_on_cpu() -> Iterator[None]:
    """Inside, ``--attn_backend varlen`` runs on CPU tensors, in any precision."""
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", _forward, "CPU")
        library.impl("_varlen_attn_backward", _backward, "CPU")
        yield
