"""Causal attention with grouped key/value heads (GQA, arXiv:2305.13245), with a choice of backends.

Letters: B batch, S sequence, N query heads, K key/value heads, H head dimension, T = B * S tokens.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion

from tinytron.kernels.attention_tiled import can_tile, tiled_attention
from tinytron.kernels.choice import Backend, check_varlen_dropout
from tinytron.utils.sequences import Documents, rows_as_documents, visible

VARLEN_BACKENDS = frozenset({"flash", "varlen"})  # backends that take document boundaries and windows, not masks
# Since torch 2.12 varlen_attn must be told that query heads share keys; 2.11 infers it from the shapes.
_SHARED_HEADS: dict[str, Any] = {"enable_gqa": True} if TorchVersion(torch.__version__) >= "2.12" else {}


def attend(
    q_BSNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    *,
    backend: Backend = "auto",
    documents: Documents | None = None,
    window: int = 0,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention, ``[B, S, N, H] -> [B, S, N, H]``; ``N`` is a multiple of ``K``.

    With ``window`` (arXiv:2310.06825, section 2) a token attends to the last ``window`` tokens, including
    itself. If ``documents`` has a mask, that is used as it is. Backends: ``sdpa`` is torch's fused kernel;
    ``auto`` is ``sdpa``, or on CPUs ``tiled_attention`` where that is faster; ``flash`` is the flash-attn
    package; ``varlen`` is torch's kernel for documents; ``math`` is the readable reference with explicit
    scores and a softmax in fp32 (fp64 for fp64 inputs).
    """
    if backend == "varlen":
        return _attend_varlen(q_BSNH, k_BSKH, v_BSKH, documents, window, dropout)
    if backend == "flash":
        return _attend_flash(q_BSNH, k_BSKH, v_BSKH, documents, window, dropout)
    B, S = q_BSNH.shape[:2]
    seen = visible(documents, window, B, S, q_BSNH.dtype, q_BSNH.device)
    mask = None if seen is None else seen.mask
    if backend == "math":
        return _attend_math(q_BSNH, k_BSKH, v_BSKH, mask, dropout)
    if backend == "auto" and can_tile(q_BSNH, dropout):
        return tiled_attention(q_BSNH, k_BSKH, v_BSKH, mask)
    if mask is not None and q_BSNH.is_cuda:
        # With a mask, CUDA's fused kernels need a key per query head; otherwise all scores would be in memory.
        k_BSKH, v_BSKH = (one_per_query_head(t, q_BSNH.shape[2]) for t in (k_BSKH, v_BSKH))
    out_BNSH = F.scaled_dot_product_attention(
        q_BSNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        enable_gqa=q_BSNH.shape[2] != k_BSKH.shape[2],
    )
    return out_BNSH.transpose(1, 2)


def one_per_query_head(x_BSKH: torch.Tensor, N: int) -> torch.Tensor:
    """Repeat each key or value head for every query head that shares it: ``[B, S, K, H] -> [B, S, N, H]``."""
    return x_BSKH.repeat_interleave(N // x_BSKH.shape[2], dim=2)


def _attend_math(
    q_BSNH: torch.Tensor, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    (B, S, N, H), K = q_BSNH.shape, k_BSKH.shape[2]
    compute = torch.promote_types(q_BSNH.dtype, torch.float32)
    q_BSKGH = q_BSNH.view(B, S, K, N // K, H).to(compute)
    scores_BKGSS = torch.einsum("bskgh,btkh->bkgst", q_BSKGH, k_BSKH.to(compute)) * H**-0.5
    if mask is None:
        future = torch.ones(S, S, dtype=torch.bool, device=q_BSNH.device).triu(1)
        scores_BKGSS = scores_BKGSS.masked_fill(future, float("-inf"))
    else:
        scores_BKGSS = scores_BKGSS + mask.unsqueeze(1)
    weights = scores_BKGSS.softmax(-1)
    weights = F.dropout(weights, dropout) if dropout > 0 else weights
    out_BSKGH = torch.einsum("bkgst,btkh->bskgh", weights, v_BSKH.to(compute))
    return out_BSKGH.reshape(B, S, N, H).to(q_BSNH.dtype)


def _attend_flash(
    q_BSNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    documents: Documents | None,
    window: int,
    dropout: float,
) -> torch.Tensor:
    flash = importlib.import_module("flash_attn")
    options = {"window_size": (window - 1, 0)} if window else {}  # additional tokens to the left and to the right
    if documents is None:
        out: torch.Tensor = flash.flash_attn_func(q_BSNH, k_BSKH, v_BSKH, dropout_p=dropout, causal=True, **options)
        return out
    out_TNH: torch.Tensor = flash.flash_attn_varlen_func(
        q_BSNH.flatten(0, 1),
        k_BSKH.flatten(0, 1),
        v_BSKH.flatten(0, 1),
        documents.cu_seqlens,
        documents.cu_seqlens,
        documents.max_len,
        documents.max_len,
        dropout_p=dropout,
        causal=True,
        **options,
    )
    return out_TNH.view_as(q_BSNH)


def _attend_varlen(
    q_BSNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    documents: Documents | None,
    window: int,
    dropout: float,
) -> torch.Tensor:
    from torch.nn.attention import varlen  # loads torch's compiler, which takes a second

    check_varlen_dropout(dropout)
    (B, S, N, _), K = q_BSNH.shape, k_BSKH.shape[2]
    cu_seqlens, longest, _ = documents or rows_as_documents(B, S, q_BSNH.device)
    out_TNH: Any = varlen.varlen_attn(  # a tensor, because no auxiliary output is requested
        q_BSNH.flatten(0, 1),
        k_BSKH.flatten(0, 1),
        v_BSKH.flatten(0, 1),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        window_size=(window - 1 if window else -1, 0),  # additional tokens to the left (-1: all) and to the right
        **(_SHARED_HEADS if N != K else {}),
    )
    out: torch.Tensor = out_TNH.view_as(q_BSNH)
    return out
