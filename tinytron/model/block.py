"""A transformer block and what of it is computed again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tinytron.distributed.parallel_state import ParallelState
from tinytron.model.config import ModelConfig
from tinytron.model.modules.attn import Attention, Backend, Documents, LayerCache
from tinytron.model.modules.emb import Rotation
from tinytron.model.modules.mlp import GELU, SwiGLU, make_mlp
from tinytron.model.modules.moe import MoE, MoEStats
from tinytron.model.modules.norm import make_norm

Recompute = Literal["none", "full", "selective"]

# What selective recomputation keeps: the outputs of matrix products and attention, costly to compute again; norms,
# rotations and activations are cheap (Korthikanti et al., arXiv:2205.05198, section 5).
# The router's choice is always kept: chosen again it could differ in a tie, and the ranks would wait for each other.
_ROUTING_OPS = {torch.ops.aten.topk.default}
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._grouped_mm.default}
_ATTENTION_OPS = {
    torch.ops.tinytron.tiled_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
_KEPT_OPS = _ROUTING_OPS | _PRODUCTS | _ATTENTION_OPS


def _keep(kept: set[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(partial(_keep, _KEPT_OPS))


def _dropout_contexts() -> Any:
    """A kept attention would not draw its dropout again in recomputation, and all later draws would be others."""
    return create_selective_checkpoint_contexts(partial(_keep, _KEPT_OPS - _ATTENTION_OPS))


def _routing_contexts() -> Any:
    return create_selective_checkpoint_contexts(partial(_keep, _ROUTING_OPS))


# torch.compile caches a graph across processes if a text says what is kept.
_selective_contexts.cache_hash = f"keep {sorted(map(str, _KEPT_OPS))}"  # type: ignore[attr-defined]
_dropout_contexts.cache_hash = f"keep {sorted(map(str, _KEPT_OPS - _ATTENTION_OPS))}"  # type: ignore[attr-defined]
_routing_contexts.cache_hash = f"keep {sorted(map(str, _ROUTING_OPS))}"  # type: ignore[attr-defined]


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``. Shapes: ``[B, s, D] -> [B, s, D]``, and the routing's
    statistics if the feed-forward layer is a mixture of experts."""

    def __init__(
        self, config: ModelConfig, layer: int, backend: Backend, recompute: Recompute, state: ParallelState | None
    ) -> None:
        super().__init__()
        self.dropout, self.recompute = config.dropout, recompute
        self.attn_norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.attn = Attention(config, backend, state, config.window(layer))
        self.mlp_norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.mlp: SwiGLU | GELU | MoE
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, state)
        else:
            self.mlp = make_mlp(config.mlp_type, config.hidden_size, config.intermediate_size, config.has_mlp_bias)

    def forward(
        self,
        x_BsD: torch.Tensor,
        rotation: Rotation,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, MoEStats | None]:
        # Inside the block, so that torch.compile sees the recomputation and fuses across it.
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._forward(x_BsD, rotation, documents, cache)
        contexts: dict[str, Any] = {}  # torch.compile cannot trace the default when it is passed
        if self.recompute == "selective":
            contexts["context_fn"] = _selective_contexts if self.dropout == 0 else _dropout_contexts
        elif isinstance(self.mlp, MoE):
            contexts["context_fn"] = _routing_contexts
        out: tuple[torch.Tensor, MoEStats | None] = checkpoint(
            self._forward, x_BsD, rotation, documents, use_reentrant=False, **contexts
        )
        return out

    def _forward(
        self, x_BsD: torch.Tensor, rotation: Rotation, documents: Documents | None, cache: LayerCache | None = None
    ) -> tuple[torch.Tensor, MoEStats | None]:
        x_BsD = x_BsD + self._drop(self.attn(self.attn_norm(x_BsD), rotation, documents, cache))
        out_BsD, stats = self._feed_forward(self.mlp_norm(x_BsD))
        return x_BsD + self._drop(out_BsD), stats

    def _feed_forward(self, x_BsD: torch.Tensor) -> tuple[torch.Tensor, MoEStats | None]:
        if isinstance(self.mlp, MoE):
            routed: tuple[torch.Tensor, MoEStats] = self.mlp(x_BsD)
            return routed
        return self.mlp(x_BsD), None

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout > 0 else x


class ParallelBlock(Block):
    """``x + attention(norm(x)) + mlp(other_norm(x))``, as GPT-NeoX has it (arXiv:2204.06745, section 2.1)."""

    def _forward(
        self, x_BsD: torch.Tensor, rotation: Rotation, documents: Documents | None, cache: LayerCache | None = None
    ) -> tuple[torch.Tensor, MoEStats | None]:
        attended_BsD = self._drop(self.attn(self.attn_norm(x_BsD), rotation, documents, cache))
        out_BsD, stats = self._feed_forward(self.mlp_norm(x_BsD))
        return x_BsD + attended_BsD + self._drop(out_BsD), stats
