"""Causal self-attention with grouped key/value heads (GQA, arXiv:2305.13245).

Letters: B batch, S sequence, N query heads, K key/value heads, H head dimension, D model dimension, T = B * S tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import varlen

from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.sequence_parallel.ulysses import HeadPlan, head_to_seq, seq_to_head
from tinytron.errors import ConfigError
from tinytron.kernels.tiled_attention import can_tile, tiled_attention
from tinytron.model.config import ModelConfig
from tinytron.model.modules.emb import Rotation, rotate
from tinytron.model.modules.linear import PackedLinear, ResidualLinear
from tinytron.model.modules.norm import make_norm
from tinytron.utils.sequences import Documents

Backend = Literal["auto", "sdpa", "flash", "varlen", "math"]
UNMASKED = frozenset({"flash", "varlen"})  # backends that take the documents' boundaries and the windows, no masks
# From torch 2.12 on varlen_attn is told that query heads share keys; 2.11 takes them as they are.
_SHARED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
)


class LayerCache(Protocol):
    """What a layer keeps of the tokens before, when a sequence comes in parts (inference/kv_cache.py)."""

    def attend(self, q_BsNH: torch.Tensor, k_BsKH: torch.Tensor, v_BsKH: torch.Tensor) -> torch.Tensor:
        """Keep the rotated keys, and the values, of ``s`` more tokens; their attention to all that is kept:
        ``[B, s, N, H] -> [B, s, N, H]``."""


def visible(
    documents: Documents | None, window: int, B: int, S: int, dtype: torch.dtype, device: torch.device
) -> Documents | None:
    """What a layer with ``window`` (0: none) is to be given: ``documents`` with their mask; the mask of the window alone,
    the same ``[1, 1, S, S]`` for all rows; or ``None``, if every token sees all before it."""
    window = window if window < S else 0
    if documents is not None:
        return documents.with_mask(B, S, dtype, window)
    if not window:
        return None
    return _rows_as_documents(B, S, device).with_mask(1, S, dtype, window)


def _rows_as_documents(B: int, S: int, device: torch.device) -> Documents:
    return Documents(torch.arange(0, B * S + 1, S, dtype=torch.int32, device=device), S)


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises: ConfigError if ``backend`` cannot run on this device or in this precision."""
    if backend not in UNMASKED:
        return
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError("--attn_backend flash needs the flash-attn package: pip install flash-attn; or use sdpa")
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"--attn_backend {backend} runs on CUDA in bf16 or fp16 only, not on {device.type} in {dtype}; use sdpa"
        )
    if backend == "varlen" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            "--attn_backend varlen needs a GPU of compute capability 8.0 (Ampere) or newer, and this is "
            f"{torch.cuda.get_device_name(device)}; use sdpa"
        )


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

    With ``window`` (arXiv:2310.06825, section 2) a token sees the last ``window`` tokens, itself included; a mask that
    ``documents`` brings is taken as it is. ``auto`` is SDPA, and on CPUs ``tiled_attention`` where it is faster; ``math``
    the readable reference: explicit scores, softmax in fp32 (fp64 for fp64 inputs).
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
        # With a mask CUDA's fused kernels want a key for every query head: else all scores would be held.
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
    """``[B, S, K, H] -> [B, S, N, H]``: each key or value head as often as query heads share it."""
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
    options = {"window_size": (window - 1, 0)} if window else {}  # tokens to the left beside the own one, and right
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
    if dropout > 0:
        raise ConfigError(f"--attn_backend varlen has no dropout, and --dropout is {dropout}; use --attn_backend sdpa")
    (B, S, N, _), K = q_BSNH.shape, k_BSKH.shape[2]
    cu_seqlens, longest, _ = documents or _rows_as_documents(B, S, q_BSNH.device)
    out_TNH: Any = varlen.varlen_attn(  # a tensor, as nothing else is asked for
        q_BSNH.flatten(0, 1),
        k_BSKH.flatten(0, 1),
        v_BSKH.flatten(0, 1),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        window_size=(window - 1 if window else -1, 0),  # tokens to the left beside the own one (-1: all), and right
        **(_SHARED_HEADS if N != K else {}),
    )
    out: torch.Tensor = out_TNH.view_as(q_BSNH)
    return out


class Attention(nn.Module):
    """Projections, rotation and attention. Query, key and value weights are one matrix, ``[(N + 2K) H, D]``, in that
    order. Shapes: ``[B, s, D] -> [B, s, D]``: under sequence parallelism each rank has a part of the sequence, and inside
    some heads of all of it (ulysses.py); the rotation is that of this rank's positions, documents are those of the whole.
    ``window`` as in ``attend``.
    """

    def __init__(
        self, config: ModelConfig, backend: Backend = "auto", state: ParallelState | None = None, window: int = 0
    ) -> None:
        super().__init__()
        self.window = window
        self.plan = HeadPlan(config.num_attention_heads, config.num_key_value_heads, state.layout.sep if state else 1)
        self.group = state.groups["sep"] if state else None
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.dropout, self.backend = config.resolved_head_dim, config.dropout, backend
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = PackedLinear(config.hidden_size, (width, kv_width, kv_width), bias=config.has_qkv_bias)
        self.out_proj = ResidualLinear(width, config.hidden_size, bias=config.has_out_bias)
        norm = partial(make_norm, config.norm_type, self.head_dim, config.norm_eps)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def forward(
        self,
        x_BsD: torch.Tensor,
        rotation: Rotation,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        B, s, _ = x_BsD.shape
        N, K = self.num_heads, self.num_kv_heads
        qkv = self.qkv_proj(x_BsD).view(B, s, N + 2 * K, self.head_dim)
        q, k, v = qkv.split((N, K, K), dim=2)
        if self.q_norm is None or self.k_norm is None:
            q, k = rotate(qkv[:, :, : N + K], rotation).split((N, K), dim=2)  # one rotation for both
        else:
            q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        if cache is not None:
            joined: torch.Tensor = self.out_proj(cache.attend(q, k, v).flatten(2))
            return joined
        if self.group is not None and self.plan.size > 1:
            packed_BSmH = seq_to_head(torch.cat((q, k, v), dim=2), self.plan, self.group)
            q, k, v = packed_BSmH.split((self.plan.heads, self.plan.kv_heads, self.plan.kv_heads), dim=2)
        elif self.q_norm is None:
            v = v.contiguous()  # a part of qkv would keep all of it for the backward pass
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, backend=self.backend, documents=documents, window=self.window, dropout=dropout)
        if self.group is not None and self.plan.size > 1:
            out = head_to_seq(out, self.plan, self.group)
        projected: torch.Tensor = self.out_proj(out.flatten(2))
        return projected
