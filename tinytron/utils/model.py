"""Exact parameter and FLOP counts of a GPT, computed from its configuration (tests compare them with real counts, P14)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class GPTShape(Protocol):
    """The fields of ``ModelConfig`` that determine sizes (floor 0 cannot import it)."""

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
    def block_size(self) -> int: ...
    @property
    def mlp_type(self) -> str: ...
    @property
    def norm_type(self) -> str: ...
    @property
    def position_type(self) -> str: ...
    @property
    def has_qkv_bias(self) -> bool: ...
    @property
    def has_out_bias(self) -> bool: ...
    @property
    def has_mlp_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def tied_lm_head(self) -> bool: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def num_shared_experts(self) -> int: ...
    def is_moe_layer(self, layer: int) -> bool: ...
    def window(self, layer: int) -> int: ...


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: in total, used by one token, and in the token embedding. All learned positions count as
    used."""

    total: int
    active: int
    embedding: int


def count_parameters(shape: GPTShape) -> ParameterCount:
    """Count the parameters of the model that ``shape`` describes; tied embedding and head count once."""
    D, H = shape.hidden_size, shape.resolved_head_dim
    q, kv = shape.num_attention_heads * H, shape.num_key_value_heads * H
    per_norm = 2 if shape.norm_type == "layer" else 1  # weight and bias
    biases = (q + 2 * kv) * shape.has_qkv_bias + D * shape.has_out_bias
    attention = D * (q + 2 * kv) + q * D + 2 * H * per_norm * shape.qk_norm + biases
    norms = 2 * D * per_norm
    inputs = _mlp_inputs(shape)

    def feed_forward(width: int) -> int:
        return (inputs + 1) * D * width + (inputs * width + D) * shape.has_mlp_bias

    experts, dense = _layers(shape)
    expert = 3 * D * shape.moe_intermediate_size
    shared_width = shape.num_shared_experts * shape.moe_intermediate_size
    # The router and the shared experts, which every token uses.
    everywhere = D * shape.num_experts + (feed_forward(shared_width) if shared_width else 0)
    mlps = dense * feed_forward(shape.intermediate_size) + experts * everywhere
    embedding = shape.vocab_size * D
    positions = shape.block_size * D if shape.position_type == "learned" else 0
    outside = embedding * (1 if shape.tied_lm_head else 2) + positions + D * per_norm  # the final norm
    used = shape.num_layer * (attention + norms) + mlps + outside
    return ParameterCount(
        total=used + experts * shape.num_experts * expert,
        active=used + experts * shape.num_experts_per_tok * expert,
        embedding=embedding,
    )


def _mlp_inputs(shape: GPTShape) -> int:
    """Number of matrices in the feed-forward layer that read its input; another one writes its output."""
    return 2 if shape.mlp_type == "swiglu" else 1


def _layers(shape: GPTShape) -> tuple[int, int]:
    """The number of layers with experts, and the number with a dense feed-forward."""
    experts = sum(shape.is_moe_layer(layer) for layer in range(shape.num_layer))
    return experts, shape.num_layer - experts


def train_flops_per_token(shape: GPTShape, seq_len: int, *, causal: bool = True) -> float:
    """Floating-point operations of the forward and backward pass for one token of a ``seq_len`` sequence.

    Only matrix products count (a multiply-add is 2), and the backward pass counts twice the forward pass. Recomputation is
    not counted, so the ratio to the peak is MFU, not HFU (PaLM, arXiv:2204.02311, appendix B). With ``causal`` a token
    attends to (seq_len + 1) / 2 positions on average, or fewer in layers with a sliding window. Otherwise it attends to all
    positions, as ``torch.utils.flop_counter`` assumes.
    """
    D, H = shape.hidden_size, shape.resolved_head_dim
    q, kv = shape.num_attention_heads * H, shape.num_key_value_heads * H
    windows = [shape.window(layer) for layer in range(shape.num_layer)]
    attended = sum(_attended(seq_len, window) if causal else seq_len for window in windows)
    attention = shape.num_layer * (2 * D * (q + 2 * kv) + 2 * q * D) + 2 * 2 * q * attended
    experts, dense = _layers(shape)
    passed = (shape.num_experts_per_tok + shape.num_shared_experts) * shape.moe_intermediate_size
    mlps = experts * (2 * D * shape.num_experts + 2 * 3 * D * passed)
    mlps += dense * 2 * (_mlp_inputs(shape) + 1) * D * shape.intermediate_size
    forward = attention + mlps + 2 * D * shape.vocab_size
    return 3 * forward


def _attended(seq_len: int, window: int) -> float:
    """Average number of positions that a token attends to, including its own; ``window`` 0: no limit."""
    w = min(window or seq_len, seq_len)
    return w - w * (w - 1) / (2 * seq_len)
