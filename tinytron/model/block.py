"""A transformer block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tinytron.distributed.parallel_state import ParallelState
from tinytron.model.config import ModelConfig
from tinytron.model.modules.attn import Attention, Backend, LayerCache
from tinytron.model.modules.compiled import CompilesMethods
from tinytron.model.modules.emb import Rotation
from tinytron.model.modules.mlp import GELU, SwiGLU, make_mlp
from tinytron.model.modules.moe import MoE, MoEStats
from tinytron.model.modules.norm import make_norm
from tinytron.model.modules.recompute import Recompute, recomputed
from tinytron.utils.sequences import Documents


class Block(CompilesMethods):
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
            self.mlp = MoE(config, state, recompute)
        else:
            self.mlp = make_mlp(config.mlp_type, config.hidden_size, config.intermediate_size, config.has_mlp_bias)

    def forward(
        self,
        x_BsD: torch.Tensor,
        rotation: Rotation,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, MoEStats | None]:
        """``cache`` is for generation only: nothing is recomputed then."""
        args = (x_BsD, rotation, documents, cache)
        if not isinstance(self.mlp, MoE):
            return recomputed(self.recompute, self._dense, *args, dropout=self.dropout), None
        x_BsD, normed_BsD, logits_TE = self._before_experts(*args)
        out_BsD, stats = self.mlp(normed_BsD, logits_TE)
        return x_BsD + self._drop(out_BsD), stats

    def compile_parts(self) -> None:
        """Compile all of it; with experts what lies between two exchanges, because how many rows come is data.

        ``recomputed`` is called inside of what is compiled: the compiler then fuses across it. Outside, selective
        recomputation would hold on to buffers that compiled code overwrites."""
        if isinstance(self.mlp, MoE):
            self.compile_methods("_before_experts")
            self.mlp.compile_parts()
        else:
            self.compile()

    def _dense(self, *args: Any) -> torch.Tensor:
        x_BsD, normed_BsD = self._attended(*args)
        return x_BsD + self._drop(self.mlp(normed_BsD))

    def _before_experts(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Up to the router's logits: the choice, made again, could differ in a tie, and ranks would wait for each other.
        return recomputed(self.recompute, self._scored, *args, dropout=self.dropout)

    def _scored(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert isinstance(self.mlp, MoE), "called for experts only"
        x_BsD, normed_BsD = self._attended(*args)
        return x_BsD, normed_BsD, self.mlp.router(normed_BsD.flatten(0, 1))

    def _attended(
        self, x_BsD: torch.Tensor, rotation: Rotation, documents: Documents | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is handed on, and what the feed-forward layer gets."""
        x_BsD = x_BsD + self._drop(self.attn(self.attn_norm(x_BsD), rotation, documents, cache))
        return x_BsD, self.mlp_norm(x_BsD)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout > 0 else x


class ParallelBlock(Block):
    """``x + attention(norm(x)) + mlp(other_norm(x))``, as GPT-NeoX has it (arXiv:2204.06745, section 2.1)."""

    def _attended(
        self, x_BsD: torch.Tensor, rotation: Rotation, documents: Documents | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended_BsD = self._drop(self.attn(self.attn_norm(x_BsD), rotation, documents, cache))
        return x_BsD + attended_BsD, self.mlp_norm(x_BsD)
