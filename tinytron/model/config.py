"""The architecture: what the weights mean. How they are computed (backend, recomputation) is not here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tinytron.distributed.layout import divisors
from tinytron.errors import ConfigError
from tinytron.utils.flags import Flag


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and options of a GPT. Raises: ConfigError if they contradict each other."""

    block_size: Annotated[int, Flag("longest sequence the model accepts", "tokens")] = 4096
    vocab_size: Annotated[int, Flag("number of token ids")] = 50304
    num_layer: Annotated[int, Flag("number of transformer blocks")] = 32
    num_attention_heads: Annotated[int, Flag("query heads")] = 128
    num_key_value_heads: Annotated[int, Flag("key and value heads, each shared by a group of query heads (GQA)")] = 8
    hidden_size: Annotated[int, Flag("width of the residual stream")] = 1024
    intermediate_size: Annotated[int, Flag("width of the feed-forward layer (SwiGLU)")] = 4096
    head_dim: Annotated[int | None, Flag("width of one head; default hidden_size / num_attention_heads")] = None
    rope_theta: Annotated[float, Flag("base of the rotary position frequencies")] = 10000.0
    qk_norm: Annotated[bool, Flag("normalise queries and keys per head before the rotation")] = False
    bias: Annotated[bool, Flag("biases in the attention and feed-forward projections")] = False
    norm_eps: Annotated[float, Flag("added to the mean square in RMSNorm")] = 1e-6
    dropout: Annotated[float, Flag("dropout on embeddings, attention weights and block outputs", "probability")] = 0.0
    init_std: Annotated[
        float, Flag("standard deviation of the initial weights; residual outputs get init_std / sqrt(2 num_layer)")
    ] = 0.013
    tied_lm_head: Annotated[bool, Flag("the output head shares the token embedding's weight")] = True
    use_moe: Annotated[bool, Flag("mixture-of-experts feed-forward layers")] = False
    num_experts: Annotated[int, Flag("experts per layer")] = 128
    num_experts_per_tok: Annotated[int, Flag("experts that each token is sent to")] = 8
    moe_intermediate_size: Annotated[int, Flag("width of one expert")] = 256
    num_shared_experts: Annotated[int, Flag("experts that every token passes, beside the chosen ones")] = 0
    first_k_dense: Annotated[int, Flag("leading layers that keep the dense feed-forward")] = 0
    moe_router_score: Annotated[
        Literal["softmax", "sigmoid"], Flag("how router logits become scores; the choice is by score")
    ] = "softmax"
    norm_topk_prob: Annotated[bool, Flag("the chosen scores are divided by their sum")] = True
    moe_aux_loss_coef: Annotated[float, Flag("weight of the load-balance loss, summed over layers")] = 0.01
    moe_aux_loss_scope: Annotated[
        Literal["sequence", "batch"], Flag("balance over each sequence, or over the micro-batch of all ranks")
    ] = "sequence"
    moe_z_loss_coef: Annotated[float, Flag("weight of the squared log-sum of the router's logits")] = 0.0
    moe_bias_update_rate: Annotated[float, Flag("step of the loss-free balancing bias; 0: no bias")] = 0.0

    def __post_init__(self) -> None:
        sizes = ["block_size", "vocab_size", "num_layer", "num_attention_heads", "num_key_value_heads", "hidden_size"]
        sizes += ["intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size"]
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least 1")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ConfigError(
                f"--num_key_value_heads {kv_heads} must divide --num_attention_heads {heads}; "
                f"use one of {divisors(heads)}"
            )
        if self.head_dim is None and self.hidden_size % heads:
            # Those that also keep the head dimension even and the number of key and value heads a divisor.
            even = [n for n in divisors(self.hidden_size) if self.hidden_size // n % 2 == 0]
            fitting = [n for n in even if n % kv_heads == 0]
            raise ConfigError(
                f"--num_attention_heads {heads} must divide --hidden_size {self.hidden_size}; "
                + (f"use one of {fitting}, or give --head_dim" if fitting else "use --head_dim 64")
            )
        if self.resolved_head_dim % 2 or self.resolved_head_dim < 2:
            raise ConfigError(
                f"the head dimension {self.resolved_head_dim} must be even for rotary positions; "
                f"use --head_dim {max(2, self.resolved_head_dim + self.resolved_head_dim % 2)}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"--dropout {self.dropout} must be in [0, 1); use 0.1")
        for name, works in (("init_std", 0.013), ("norm_eps", 1e-6), ("rope_theta", 10000.0)):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name} {getattr(self, name)} must be positive; use {works}")
        for name in (
            "num_shared_experts",
            "first_k_dense",
            "moe_aux_loss_coef",
            "moe_z_loss_coef",
            "moe_bias_update_rate",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least 0; use 0")
        if self.use_moe and self.first_k_dense >= self.num_layer:
            raise ConfigError(
                f"--first_k_dense {self.first_k_dense} leaves no expert layer of --num_layer {self.num_layer}; "
                f"use at most {self.num_layer - 1}, or drop --use_moe"
            )
        if self.use_moe and self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"--num_experts_per_tok {self.num_experts_per_tok} must not exceed --num_experts {self.num_experts}; "
                f"use at most {self.num_experts}"
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) has experts."""
        return self.use_moe and layer >= self.first_k_dense

    @property
    def resolved_head_dim(self) -> int:
        """Width of one head, given or derived."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads
