"""The plain-torch model of step_time.py: what one writes first, in torch's own layers, with nothing packed or by hand.

Letters: B batch, S sequence, T = B S tokens, N heads, k choices of a token, H head dimension, D width, V vocabulary.
Modules are named as in Hugging Face's Llama and Mixtral, so that weights with those names load as they are.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tinytron.model import ModelConfig


def turn(x_BNSH: torch.Tensor, cos_SH: torch.Tensor, sin_SH: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv:2104.09864) in the pairing of GPT-NeoX: element i with i + H/2."""
    first, second = x_BNSH.chunk(2, dim=-1)
    return x_BNSH * cos_SH + torch.cat((-second, first), dim=-1) * sin_SH


class PlainAttention(nn.Module):
    """Causal attention with separate projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = H = config.resolved_head_dim
        width, kv_width = config.num_attention_heads * H, config.num_key_value_heads * H
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x_BSD: torch.Tensor, cos_SH: torch.Tensor, sin_SH: torch.Tensor) -> torch.Tensor:
        """``[B, S, D] -> [B, S, D]``."""
        B, S, _ = x_BSD.shape
        heads = (proj(x_BSD).view(B, S, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x_BSNH.transpose(1, 2) for x_BSNH in heads)
        q, k = turn(q, cos_SH, sin_SH), turn(k, cos_SH, sin_SH)
        shared = q.shape[1] != k.shape[1]
        out_BNSH = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        out: torch.Tensor = self.o_proj(out_BNSH.transpose(1, 2).flatten(2))
        return out


class PlainMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202) with separate projections."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., D] -> [..., D]``."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class PlainMoE(nn.Module):
    """Each expert in turn on the tokens that chose it; the weights of a token's experts sum up to 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            PlainMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """``[B, S, D] -> [B, S, D]``."""
        x_TD = x_BSD.flatten(0, 1)
        scores_Tk, expert_Tk = self.gate(x_TD).float().topk(self.top_k)
        weight_Tk = scores_Tk.softmax(-1).to(x_TD.dtype)
        out_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(expert_Tk == e)
            out_TD = out_TD.index_add(0, token, expert(x_TD[token]) * weight_Tk[token, choice].unsqueeze(1))
        return out_TD.view_as(x_BSD)


class PlainBlock(nn.Module):
    """Pre-norm attention and feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = PlainAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        dense = not config.use_moe
        self.mlp = PlainMLP(config.hidden_size, config.intermediate_size) if dense else PlainMoE(config)

    def forward(self, x_BSD: torch.Tensor, cos_SH: torch.Tensor, sin_SH: torch.Tensor) -> torch.Tensor:
        """``[B, S, D] -> [B, S, D]``."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_SH, sin_SH)
        out: torch.Tensor = x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))
        return out


class PlainGPT(nn.Module):
    """Token ids ``[B, S]`` and targets ``[B, S]`` to the mean cross entropy, over logits that are held in full."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layer))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        H = config.resolved_head_dim
        frequencies = config.rope_theta ** -(torch.arange(0, H, 2, dtype=torch.float32) / H)
        angles = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequencies).repeat(1, 2)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", angles.cos().to(self.norm.weight.dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(self.norm.weight.dtype), persistent=False)

    def forward(self, ids_BS: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar."""
        S = ids_BS.shape[1]
        x_BSD = self.embed_tokens(ids_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, self.cos[:S], self.sin[:S])
        logits_BSV = self.lm_head(self.norm(x_BSD))
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())
