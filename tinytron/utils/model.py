"""Exact parameter and FLOP counts of a GPT, from its configuration alone (checked against counted ones, P14)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class GPTShape(Protocol):
    """The fields of ``ModelConfig`` that decide sizes (floor 0 cannot import it)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layer(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def resolved_head_dim(self) -> int: ...
    @property
    def bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def tied_lm_head(self) -> bool: ...
    @property
    def use_moe(self) -> bool: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: all of them, those one token uses, and those in the token embedding."""

    total: int
    active: int
    embedding: int


def count_parameters(shape: GPTShape) -> ParameterCount:
    """Parameters of the model that ``shape`` describes; tied embedding and head are counted once."""
    D, H = shape.hidden_size, shape.resolved_head_dim
    q, kv = shape.num_attention_heads * H, shape.num_key_value_heads * H
    attention = D * (q + 2 * kv) + q * D + 2 * H * shape.qk_norm + (q + 2 * kv + D) * shape.bias
    norms = 2 * D

    def feed_forward(width: int) -> int:
        return 3 * D * width + (2 * width + D) * shape.bias

    if shape.use_moe:
        expert = 3 * D * shape.moe_intermediate_size
        router = D * shape.num_experts
        mlp_total, mlp_active = router + shape.num_experts * expert, router + shape.num_experts_per_tok * expert
    else:
        mlp_total = mlp_active = feed_forward(shape.intermediate_size)
    embedding = shape.vocab_size * D
    outside = embedding * (1 if shape.tied_lm_head else 2) + D  # D: the final norm
    layer = attention + norms
    return ParameterCount(
        total=shape.num_layer * (layer + mlp_total) + outside,
        active=shape.num_layer * (layer + mlp_active) + outside,
        embedding=embedding,
    )


def train_flops_per_token(shape: GPTShape, seq_len: int, *, causal: bool = True) -> float:
    """Floating-point operations of forward and backward for one token of a ``seq_len`` sequence.

    Only matrix products count (a multiply-add is 2), backward is twice the forward, recomputation is not counted, so
    the ratio to the peak is MFU, not HFU (PaLM, arXiv:2204.02311, appendix B). With ``causal`` a token attends to
    (seq_len + 1) / 2 positions on average; without, to all (what ``torch.utils.flop_counter`` assumes).
    """
    D, H = shape.hidden_size, shape.resolved_head_dim
    q, kv = shape.num_attention_heads * H, shape.num_key_value_heads * H
    attended = (seq_len + 1) / 2 if causal else seq_len
    attention = 2 * D * (q + 2 * kv) + 2 * q * D + 2 * 2 * q * attended
    if shape.use_moe:
        mlp = 2 * D * shape.num_experts + shape.num_experts_per_tok * 2 * 3 * D * shape.moe_intermediate_size
    else:
        mlp = 2 * 3 * D * shape.intermediate_size
    forward = shape.num_layer * (attention + mlp) + 2 * D * shape.vocab_size
    return 3 * forward
