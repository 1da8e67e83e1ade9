"""Causal self-attention with grouped key/value heads (GQA, arXiv:2305.13245).

Letters: B batch, S sequence, N query heads, K key/value heads, H head dimension, D model dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.sequence_parallel.ulysses import HeadPlan, head_to_seq, seq_to_head
from tinytron.hooks.points import HasPoints
from tinytron.kernels.attention import attend
from tinytron.kernels.choice import DEFAULT, Kernels
from tinytron.kernels.rope import Rotation, rotate
from tinytron.model.config import ModelConfig
from tinytron.model.modules.linear import PackedLinear, ResidualLinear
from tinytron.model.modules.norm import make_norm
from tinytron.utils.sequences import Documents


class LayerCache(Protocol):
    """A layer's keys and values of earlier tokens, for a sequence that is processed in parts (inference/kv_cache.py)."""

    def attend(self, q_BsNH: torch.Tensor, k_BsKH: torch.Tensor, v_BsKH: torch.Tensor) -> torch.Tensor:
        """Add the rotated keys and the values of ``s`` more tokens, and return these tokens' attention to everything in
        the cache: ``[B, s, N, H] -> [B, s, N, H]``."""


class Attention(HasPoints):
    """Projections, rotation and attention: ``[B, s, D] -> [B, s, D]``.

    Query, key and value weights are one matrix, ``[(N + 2K) H, D]``, in that order. Under sequence parallelism
    the input is this rank's part of the sequence; for attention itself the rank has some heads of the whole
    sequence (ulysses.py). ``rotation`` is for this rank's positions, ``documents`` describe whole sequences.
    ``window`` is as in ``attend``. A subclass may override the parts that ``forward`` calls, in that order.
    """

    points = ("input", "q", "k", "v", "pre_proj")
    # Gets the queries and keys of whole sequences, of this rank's heads, and the documents; for statistics.
    watch: Callable[[torch.Tensor, torch.Tensor, Documents | None], None] | None = None

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels = DEFAULT,
        state: ParallelState | None = None,
        window: int = 0,
    ) -> None:
        super().__init__()
        self.window, self.query_scale = window, config.query_scale
        self.plan = HeadPlan(config.num_attention_heads, config.num_key_value_heads, state.layout.sep if state else 1)
        self.group = state.groups["sep"] if state else None
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.dropout, self.backend = config.resolved_head_dim, config.dropout, kernels.attention
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        names = ("q_proj", "k_proj", "v_proj")
        self.qkv_proj = PackedLinear(config.hidden_size, (width, kv_width, kv_width), names, bias=config.has_qkv_bias)
        self.out_proj = ResidualLinear(width, config.hidden_size, bias=config.has_out_bias)
        norm = partial(make_norm, config.norm_type, self.head_dim, config.norm_eps, kernels)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def forward(
        self,
        x_BsD: torch.Tensor,
        rotation: Rotation,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        qkv_BsMH = self._project_inner(self.point("input", x_BsD))
        q, k, v = self.preprocess_qkv(qkv_BsMH, rotation)
        q, k, v = self.point("q", q), self.point("k", k), self.point("v", v)
        out_BsNH = self.attn(q, k, v, documents) if cache is None else cache.attend(q, k, v)
        return self.output_proj(self.point("pre_proj", self.postprocess_attn(out_BsNH)))

    def _project_inner(self, x_BsD: torch.Tensor) -> torch.Tensor:
        """All heads of queries, keys and values, in that order: ``[B, s, N + 2K, H]``."""
        B, s, _ = x_BsD.shape
        qkv: torch.Tensor = self.qkv_proj(x_BsD)
        return qkv.view(B, s, self.num_heads + 2 * self.num_kv_heads, self.head_dim)

    def preprocess_qkv(
        self, qkv_BsMH: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalized and rotated queries and keys, and values: ``[B, s, N, H]`` and twice ``[B, s, K, H]``."""
        N, K = self.num_heads, self.num_kv_heads
        q, k, v = qkv_BsMH.split((N, K, K), dim=2)
        if self.q_norm is None or self.k_norm is None:
            q, k = rotate(qkv_BsMH[:, :, : N + K], rotation).split((N, K), dim=2)  # one rotation for both
        else:
            q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        if self.query_scale != 1:
            q = q * self.query_scale
        return q, k, v

    def build_mask(self, documents: Documents | None) -> Documents | None:
        """The documents whose tokens attend to each other. A ``mask`` in them is used as it is (``utils.sequences``)."""
        return documents

    def attn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None) -> torch.Tensor:
        """Attention to the whole sequence, ``[B, s, N, H]``; in generation ``LayerCache.attend`` takes its place."""
        if self.group is not None and self.plan.size > 1:
            packed_BSmH = seq_to_head(torch.cat((q, k, v), dim=2), self.plan, self.group)
            q, k, v = packed_BSmH.split((self.plan.heads, self.plan.kv_heads, self.plan.kv_heads), dim=2)
        elif self.q_norm is None:
            v = v.contiguous()  # a view of qkv would keep all of qkv alive for the backward pass
        documents = self.build_mask(documents)
        if self.watch is not None:
            self.watch(q, k, documents)
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, backend=self.backend, documents=documents, window=self.window, dropout=dropout)
        if self.group is not None and self.plan.size > 1:
            out = head_to_seq(out, self.plan, self.group)
        return out

    def postprocess_attn(self, out_BsNH: torch.Tensor) -> torch.Tensor:
        """The input of the output projection, ``[B, s, N, H]``."""
        return out_BsNH

    def output_proj(self, out_BsNH: torch.Tensor) -> torch.Tensor:
        """The heads' contribution to the residual stream, ``[B, s, D]``."""
        projected: torch.Tensor = self.out_proj(out_BsNH.flatten(2))
        return projected
