"""A transformer block.

The parts of a block, and the values that each part keeps for the backward pass, by ``--recompute``:

| part | none | selective | full |
|---|---|---|---|
| dense block | all | outputs of matrix products, attention and exchanges | its input |
| expert block, up to the router's logits | all | outputs of matrix products, attention and exchanges | its input |
| the router's choice and the row counts | kept | kept | kept |
| dispatch, experts, sum | all | rows as exchanged, the experts' first product | its input |
| the shared expert in it | all | outputs of matrix products | (the same input) |

Recomputing the choice could break a tie differently and deadlock the ranks. ``torch.compile`` compiles a dense block as
a whole, and an expert block in the parts between two exchanges.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tinytron.distributed.parallel_state import ParallelState
from tinytron.hooks.points import HasPoints
from tinytron.kernels.choice import DEFAULT, Kernels
from tinytron.kernels.rope import Rotation
from tinytron.model.config import ModelConfig
from tinytron.model.modules.attn import Attention, LayerCache
from tinytron.model.modules.compiled import CompilesMethods
from tinytron.model.modules.mlp import GELU, SwiGLU, make_mlp
from tinytron.model.modules.moe import MoE, MoEStats
from tinytron.model.modules.norm import make_norm
from tinytron.model.modules.recompute import Recompute, recomputed
from tinytron.utils.sequences import Documents


class Block(CompilesMethods, HasPoints):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``: ``[B, s, D] -> [B, s, D]``. If the feed-forward layer is a
    mixture of experts, the block also returns routing statistics. ``attention`` is the class of the attention layer."""

    points = ("input", "post_attn", "mlp.input", "post_mlp")

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        kernels: Kernels = DEFAULT,
        recompute: Recompute = "none",
        state: ParallelState | None = None,
        attention: type[Attention] = Attention,
    ) -> None:
        super().__init__()
        self.dropout, self.recompute = config.dropout, recompute
        self.attn_norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps, kernels)
        self.attn = attention(config, kernels, state, config.window(layer))
        self.mlp_norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps, kernels)
        self.mlp: SwiGLU | GELU | MoE
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, state, recompute, kernels)
        else:
            width = config.intermediate_size
            bias = config.has_mlp_bias
            self.mlp = make_mlp(config.mlp_type, config.hidden_size, width, bias, kernels)

    def forward(
        self,
        x_BsD: torch.Tensor,
        rotation: Rotation,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
        padding_Bs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, MoEStats | None]:
        """Apply the block. ``cache`` is for generation, where nothing is recomputed and nothing counted. The
        routing statistics leave out ``padding_Bs``."""
        x_BsD = self.point("input", x_BsD)
        if not isinstance(self.mlp, MoE):
            out_BsD = recomputed(self.recompute, self._dense, x_BsD, rotation, documents, cache, dropout=self.dropout)
            return self.point("post_mlp", out_BsD), None
        x_BsD, normed_BsD, logits_TE = self._before_experts(x_BsD, rotation, documents, cache)
        out_BsD, stats = self.mlp(normed_BsD, logits_TE, padding_Bs, with_stats=cache is None)
        return self.point("post_mlp", x_BsD + self._drop(out_BsD)), stats

    def compile_parts(self) -> None:
        """Compile the whole block, or with experts only the parts between two exchanges, because row counts are data.

        ``recomputed`` is called inside compiled code, so that the compiler fuses across it. If it were called outside,
        selective recomputation would keep buffers that compiled code overwrites."""
        if isinstance(self.mlp, MoE):
            self.compile_methods("_before_experts")
            self.mlp.compile_parts()
        else:
            self.compile()

    def _dense(
        self, x_BsD: torch.Tensor, rotation: Rotation, documents: Documents | None, cache: LayerCache | None
    ) -> torch.Tensor:
        x_BsD, normed_BsD = self._attended(x_BsD, rotation, documents, cache)
        return x_BsD + self._drop(self.mlp(normed_BsD))

    def _before_experts(
        self, x_BsD: torch.Tensor, rotation: Rotation, documents: Documents | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return recomputed(self.recompute, self._scored, x_BsD, rotation, documents, cache, dropout=self.dropout)

    def _scored(
        self, x_BsD: torch.Tensor, rotation: Rotation, documents: Documents | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The residual stream, the experts' input and the router's logits ``[T, E]``."""
        assert isinstance(self.mlp, MoE), "only blocks with experts call this"
        x_BsD, normed_BsD = self._attended(x_BsD, rotation, documents, cache)
        return x_BsD, normed_BsD, self.mlp.router(normed_BsD.flatten(0, 1))

    def _attended(
        self, x_BsD: torch.Tensor, rotation: Rotation, documents: Documents | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream, and the input of the feed-forward layer."""
        x_BsD = x_BsD + self._drop(self.attn(self.attn_norm(x_BsD), rotation, documents, cache))
        x_BsD = self.point("post_attn", x_BsD)
        return x_BsD, self.point("mlp.input", self.mlp_norm(x_BsD))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout > 0 else x


class ParallelBlock(Block):
    """``x + attention(norm(x)) + mlp(other_norm(x))``, as in GPT-NeoX (arXiv:2204.06745, section 2.1)."""

    def _attended(
        self, x_BsD: torch.Tensor, rotation: Rotation, documents: Documents | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended_BsD = self._drop(self.attn(self.attn_norm(x_BsD), rotation, documents, cache))
        normed_BsD = self.point("mlp.input", self.mlp_norm(x_BsD))
        return self.point("post_attn", x_BsD + attended_BsD), normed_BsD
