"""A decoder-only transformer: embedding, pre-norm blocks, final norm, head and loss."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from tinytron.distributed.param_spec import Kind, ParamSpec
from tinytron.errors import ConfigError
from tinytron.model.config import ModelConfig
from tinytron.model.modules.attn import Attention, Backend, Documents
from tinytron.model.modules.emb import RotaryEmbedding, Rotation
from tinytron.model.modules.linear import ResidualLinear
from tinytron.model.modules.loss import LossSums, fused_linear_cross_entropy
from tinytron.model.modules.mlp import SwiGLU
from tinytron.model.modules.norm import RMSNorm

Recompute = Literal["none", "full", "selective"]

# What selective recomputation keeps: the outputs of matrix products and attention, costly to compute again; norms,
# rotations and activations are cheap (Korthikanti et al., arXiv:2205.05198, section 5).
_KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _selective_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


_selective_contexts = partial(create_selective_checkpoint_contexts, _selective_policy)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``. Shapes: ``[B, S, D] -> [B, S, D]``."""

    def __init__(self, config: ModelConfig, backend: Backend, recompute: Recompute) -> None:
        super().__init__()
        self.dropout, self.recompute = config.dropout, recompute
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config, backend)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.bias)

    def forward(self, x_BSD: torch.Tensor, rotation: Rotation, documents: Documents | None = None) -> torch.Tensor:
        # Inside the block, so that torch.compile sees the recomputation and fuses across it.
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._forward(x_BSD, rotation, documents)
        contexts = _selective_contexts if self.recompute == "selective" else noop_context_fn
        out: torch.Tensor = checkpoint(
            self._forward, x_BSD, rotation, documents, use_reentrant=False, context_fn=contexts
        )
        return out

    def _forward(self, x_BSD: torch.Tensor, rotation: Rotation, documents: Documents | None) -> torch.Tensor:
        x_BSD = x_BSD + self._drop(self.attn(self.attn_norm(x_BSD), rotation, documents))
        return x_BSD + self._drop(self.mlp(self.mlp_norm(x_BSD)))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout > 0 else x


class GPT(nn.Module):
    """The model. Weights are created on ``device`` in ``dtype`` and drawn by ``init_weights``.

    ``forward(input_ids)`` gives logits; with ``labels`` it gives ``LossSums`` instead and never builds the logits.
    Raises: ConfigError for an architecture that is not available.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 1337,
        attn_backend: Backend = "sdpa",
        recompute: Recompute = "none",
        z_loss_coef: float = 0.0,
    ) -> None:
        super().__init__()
        if config.use_moe:
            raise ConfigError("--use_moe: experts are not part of this version yet; drop the flag for a dense model")
        self.config, self.z_loss_coef = config, z_loss_coef
        outer = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
                self.blocks = nn.ModuleList(Block(config, attn_backend, recompute) for _ in range(config.num_layer))
                self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
                table = torch.promote_types(dtype, torch.float32)
                self.rope = RotaryEmbedding(config.resolved_head_dim, config.block_size, config.rope_theta, table)
        finally:
            torch.set_default_dtype(outer)
        if config.tied_lm_head:
            self.lm_head.weight = self.wte.weight
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every weight from Normal(0, init_std) by (seed, its name) alone: the same on every layout and device.

        Projections that write to the residual stream have init_std / sqrt(2 num_layer) (GPT-2, section 2.3); norms are
        one, biases zero.
        """
        residual_std = self.config.init_std / (2 * self.config.num_layer) ** 0.5
        for spec in self.param_specs():
            parameter = self.get_parameter(spec.name)
            if spec.kind == "norm":
                parameter.fill_(1.0)
            elif spec.kind == "bias":
                parameter.zero_()
            else:
                std = residual_std if spec.writes_residual else self.config.init_std
                parameter.copy_(named_normal(spec.name, spec.shape, std, seed))

    def param_specs(self) -> list[ParamSpec]:
        """One ``ParamSpec`` per parameter, in registration order; a tied head is the embedding and stands once."""
        facts: dict[str, tuple[Kind, bool]] = {}
        for prefix, module in self.named_modules():
            kind: Kind = "matrix"
            if isinstance(module, RMSNorm):
                kind = "norm"
            elif module is self.wte:
                kind = "embedding"
            elif module is self.lm_head:
                kind = "head"
            for name, _ in module.named_parameters(recurse=False):
                facts[f"{prefix}.{name}"] = ("bias" if name == "bias" else kind, isinstance(module, ResidualLinear))
        return [
            ParamSpec(name, tuple(p.shape), facts[name][0], writes_residual=facts[name][1])
            for name, p in self.named_parameters()
        ]

    def compile_blocks(self) -> None:
        """Compile every block in place (parameter names stay); blocks share one compiled graph."""
        for block in self.blocks:
            block.compile()

    def hidden_states(
        self, input_ids_BS: torch.Tensor, positions: torch.Tensor | None = None, documents: Documents | None = None
    ) -> torch.Tensor:
        """Everything but the head: ``[B, S] -> [B, S, D]``. ``positions`` default to 0 .. S - 1."""
        S = input_ids_BS.shape[1]
        if self.config.block_size < S:
            raise ConfigError(
                f"a sequence of {S} tokens exceeds --block_size {self.config.block_size}; use --block_size {S}"
            )
        x_BSD = self.wte(input_ids_BS)
        if self.config.dropout > 0:
            x_BSD = F.dropout(x_BSD, self.config.dropout, self.training)
        rotation = self.rope(S, positions)
        for block in self.blocks:
            x_BSD = block(x_BSD, rotation, documents)
        out: torch.Tensor = self.final_norm(x_BSD)
        return out

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        documents: Documents | None = None,
    ) -> torch.Tensor | LossSums:
        """Logits ``[B, S, V]``, or with ``labels`` ``[B, S]`` (already shifted; -100 is ignored) the loss *sums*."""
        x_BSD = self.hidden_states(input_ids, positions, documents)
        if labels is None:
            logits: torch.Tensor = self.lm_head(x_BSD)
            return logits
        return fused_linear_cross_entropy(
            x_BSD.flatten(0, 1), self.lm_head.weight, labels.flatten(), z_loss_coef=self.z_loss_coef
        )


def named_normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    """Normal(0, std) as a function of (seed, name) alone: fp32, drawn on the CPU, so that all devices agree."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator) * std
