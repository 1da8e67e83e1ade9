"""The configuration of the architecture, which gives the weights their meaning. Options that only affect how results are
computed (backend, recomputation) are elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tinytron.distributed.layout import divisors
from tinytron.errors import ConfigError
from tinytron.utils.flags import Flag, check_bounds


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and options of a GPT. Raises: ConfigError if they contradict each other."""

    block_size: Annotated[int, Flag("longest sequence the model accepts; default: seq_len", "tokens", at_least=1)] = (
        4096
    )
    vocab_size: Annotated[int, Flag("number of token ids", at_least=1)] = 50304
    num_layer: Annotated[int, Flag("number of transformer blocks", at_least=1)] = 32
    num_attention_heads: Annotated[int, Flag("query heads", at_least=1)] = 128
    num_key_value_heads: Annotated[
        int, Flag("key and value heads, each shared by a group of query heads (GQA)", at_least=1)
    ] = 8
    hidden_size: Annotated[int, Flag("width of the residual stream", at_least=1)] = 1024
    intermediate_size: Annotated[int, Flag("width of the feed-forward layer", at_least=1)] = 4096
    head_dim: Annotated[int | None, Flag("width of one head; default hidden_size / num_attention_heads")] = None
    mlp_type: Annotated[
        Literal["swiglu", "gelu", "gelu_tanh"],
        Flag("feed-forward layer: SiLU-gated, or two matrices with a GELU between them, exact or with tanh"),
    ] = "swiglu"
    norm_type: Annotated[Literal["rms", "layer"], Flag("RMSNorm, or LayerNorm with a bias")] = "rms"
    norm_eps: Annotated[
        float, Flag("epsilon added to the mean square or variance in the norms", above=0, at_most=1, works=1e-6)
    ] = 1e-6
    parallel_residual: Annotated[
        bool, Flag("a block's attention and feed-forward layer read the same input, each through its own norm")
    ] = False
    qk_norm: Annotated[bool, Flag("normalize queries and keys per head before the rotation")] = False
    bias: Annotated[bool, Flag("biases in the attention and feed-forward projections")] = False
    qkv_bias: Annotated[bool, Flag("biases in the query, key and value projections, even if bias is off")] = False
    attention_bias: Annotated[bool, Flag("biases in all attention projections, even if bias is off")] = False
    mlp_bias: Annotated[bool, Flag("biases in the feed-forward projections, even if bias is off")] = False
    position_type: Annotated[
        Literal["rotary", "learned"], Flag("queries and keys rotated by position, or a table of block_size vectors")
    ] = "rotary"
    rope_theta: Annotated[
        float, Flag("base of the rotary position frequencies", above=1, at_most=1e30, works=10000.0)
    ] = 10000.0
    rotary_fraction: Annotated[float, Flag("leading part of every head that is rotated", "0 to 1")] = 1.0
    rope_scaling: Annotated[
        Literal["none", "linear", "llama3", "yarn"],
        Flag("scaling of the rotary frequencies in a model that was extended to longer sequences"),
    ] = "none"
    rope_scaling_factor: Annotated[float, Flag("ratio of the extended length to the original; with rope_scaling")] = 1.0
    rope_original_block_size: Annotated[
        int | None, Flag("sequence length before the extension; with llama3 and yarn", "tokens")
    ] = None
    rope_low_freq_factor: Annotated[
        float, Flag("llama3: frequencies with fewer rotations than this over the original length are slowed down")
    ] = 1.0
    rope_high_freq_factor: Annotated[
        float, Flag("llama3: frequencies with more rotations than this over the original length stay unchanged")
    ] = 4.0
    rope_beta_fast: Annotated[
        float, Flag("yarn: frequencies with more rotations than this over the original length stay unchanged")
    ] = 32.0
    rope_beta_slow: Annotated[
        float, Flag("yarn: frequencies with fewer rotations than this over the original length are slowed down")
    ] = 1.0
    rope_attention_factor: Annotated[
        float | None, Flag("yarn: factor on queries and keys; default 0.1 ln(rope_scaling_factor) + 1")
    ] = None
    sliding_window: Annotated[
        int, Flag("attention window, including the current token; 0: no limit", "tokens", at_least=0, works=0)
    ] = 0
    sliding_window_layers: Annotated[
        tuple[int, ...], Flag("layers, counted from 0, that use sliding_window; default: all")
    ] = ()
    dropout: Annotated[
        float,
        Flag(
            "dropout on embeddings, attention weights and block outputs", "probability", at_least=0, below=1, works=0.1
        ),
    ] = 0.0
    init_std: Annotated[
        float,
        Flag(
            "standard deviation of the initial weights; projections into the residual use init_std / sqrt(2 num_layer)",
            above=0,
            at_most=10,
            works=0.013,
        ),
    ] = 0.013
    mup_base_width: Annotated[
        int,
        Flag(
            "muP: scale initial weights, learning rates, queries and output so that options tuned at this hidden_size fit; "
            "0: off",
            at_least=0,
            works=256,
        ),
    ] = 0
    tied_lm_head: Annotated[bool, Flag("the output head shares the token embedding's weight")] = True
    use_moe: Annotated[bool, Flag("mixture-of-experts feed-forward layers")] = False
    num_experts: Annotated[int, Flag("experts per layer", at_least=1)] = 128
    num_experts_per_tok: Annotated[int, Flag("experts that each token is sent to", at_least=1)] = 8
    moe_intermediate_size: Annotated[int, Flag("width of one expert", at_least=1)] = 256
    num_shared_experts: Annotated[
        int, Flag("experts that process every token, in addition to the chosen ones", at_least=0, works=0)
    ] = 0
    first_k_dense: Annotated[
        int, Flag("number of leading layers that keep a dense feed-forward", at_least=0, works=0)
    ] = 0
    dense_layers: Annotated[
        tuple[int, ...], Flag("further layers, counted from 0, that keep a dense feed-forward")
    ] = ()
    moe_router_score: Annotated[
        Literal["softmax", "sigmoid"], Flag("function that turns router logits into scores, which rank the experts")
    ] = "softmax"
    norm_topk_prob: Annotated[bool, Flag("divide the chosen experts' scores by their sum")] = True
    moe_aux_loss_coef: Annotated[
        float,
        Flag(
            "weight of the load-balance loss, a mean over tokens summed over layers",
            at_least=0,
            at_most=1e6,
            works=0,
        ),
    ] = 0.01
    moe_aux_loss_scope: Annotated[
        Literal["sequence", "batch"],
        Flag("balance over each sequence, or a micro-batch of all ranks; then its size is part of the run's identity"),
    ] = "sequence"
    moe_z_loss_coef: Annotated[
        float,
        Flag(
            "weight of the router z-loss (squared logsumexp of the logits), a mean over tokens summed over layers",
            at_least=0,
            at_most=1e6,
            works=0,
        ),
    ] = 0.0
    moe_bias_update_rate: Annotated[
        float, Flag("step size of the loss-free balancing bias; 0: no bias", at_least=0, at_most=1e6, works=0)
    ] = 0.0

    def __post_init__(self) -> None:
        check_bounds(self)
        _check_heads(self)
        if self.position_type == "rotary":
            _check_rotation(self)
        elif self.resolved_head_dim < 1:
            raise ConfigError(f"--head_dim {self.head_dim} must be at least 1")
        _check_layers(self)
        if self.use_moe and self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"--num_experts_per_tok {self.num_experts_per_tok} must not exceed --num_experts {self.num_experts}; "
                f"use at most {self.num_experts}"
            )
        if self.use_moe and self.mlp_type != "swiglu":
            raise ConfigError(
                f"--mlp_type {self.mlp_type} does not work with --use_moe: experts are swiglu; use swiglu"
            )

        if self.use_moe and self.mup_base_width:
            raise ConfigError(
                f"--mup_base_width {self.mup_base_width} has no rule for routers and experts; use 0, or drop --use_moe"
            )

    @property
    def width_mult(self) -> float:
        """muP: the width in multiples of the base width; 1 without muP."""
        return self.hidden_size / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def output_scale(self) -> float:
        """muP: the factor on what the head reads."""
        return 1.0 / self.width_mult

    @property
    def query_scale(self) -> float:
        """muP: the factor on queries that turns 1 / sqrt(head_dim) on attention scores into 1 / head_dim; else 1."""
        return self.resolved_head_dim**-0.5 if self.mup_base_width else 1.0

    def is_moe_layer(self, layer: int) -> bool:
        """True if block ``layer`` (counted from 0) has experts."""
        return self.use_moe and layer >= self.first_k_dense and layer not in self.dense_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The blocks that have experts."""
        return tuple(layer for layer in range(self.num_layer) if self.is_moe_layer(layer))

    def window(self, layer: int) -> int:
        """Attention window of block ``layer`` in tokens, including the current one; 0: no limit."""
        chosen = not self.sliding_window_layers or layer in self.sliding_window_layers
        return self.sliding_window if chosen else 0

    @property
    def resolved_head_dim(self) -> int:
        """Width of one head, given or derived."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Number of leading elements of a head that are rotated by position; 0 with learned positions."""
        return int(self.resolved_head_dim * self.rotary_fraction) if self.position_type == "rotary" else 0

    @property
    def has_qkv_bias(self) -> bool:
        """True if the query, key and value projections have biases."""
        return self.bias or self.attention_bias or self.qkv_bias

    @property
    def has_out_bias(self) -> bool:
        """True if the attention's output projection has a bias."""
        return self.bias or self.attention_bias

    @property
    def has_mlp_bias(self) -> bool:
        """True if the feed-forward projections have biases."""
        return self.bias or self.mlp_bias


def _check_heads(config: ModelConfig) -> None:
    heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    if heads % kv_heads:
        raise ConfigError(
            f"--num_key_value_heads {kv_heads} must divide --num_attention_heads {heads}; use one of {divisors(heads)}"
        )
    if config.head_dim is None and hidden % heads:
        # Suggest only values with an even head dimension that are multiples of the number of key and value heads.
        even = [n for n in divisors(hidden) if hidden // n % 2 == 0]
        fitting = [n for n in even if n % kv_heads == 0]
        raise ConfigError(
            f"--num_attention_heads {heads} must divide --hidden_size {hidden}; "
            + (f"use one of {fitting}, or give --head_dim" if fitting else "use --head_dim 64")
        )


def _check_rotation(config: ModelConfig) -> None:
    """Check the rules on rotary positions. Raises: ConfigError."""
    head_dim, fraction = config.resolved_head_dim, config.rotary_fraction
    if head_dim % 2 or head_dim < 2:
        works = max(2, head_dim + head_dim % 2)
        raise ConfigError(f"the head dimension {head_dim} must be even for rotary positions; use --head_dim {works}")
    if not 0 < fraction <= 1:
        raise ConfigError(f"--rotary_fraction {fraction} must be above 0 and at most 1; use 1.0")
    if config.rotary_dim % 2 or config.rotary_dim < 2:
        even = max(2, config.rotary_dim + config.rotary_dim % 2)
        raise ConfigError(
            f"--rotary_fraction {fraction} rotates {config.rotary_dim} of {head_dim} elements, but the number must be "
            f"even; use {even / head_dim:g}"
        )
    if config.rope_scaling == "none":
        return
    if not 1 <= config.rope_scaling_factor <= 1e6:
        raise ConfigError(f"--rope_scaling_factor {config.rope_scaling_factor} must be in 1..1e6; use 8.0")
    if config.rope_scaling in ("llama3", "yarn") and (config.rope_original_block_size or 0) < 1:
        raise ConfigError(
            f"--rope_scaling {config.rope_scaling} needs the sequence length before the extension; "
            f"use --rope_original_block_size {max(1, int(config.block_size / config.rope_scaling_factor))}"
        )
    for low, high, pair in (
        ("rope_low_freq_factor", "rope_high_freq_factor", "1.0 and 4.0"),
        ("rope_beta_slow", "rope_beta_fast", "1.0 and 32.0"),
    ):
        if not 1e-6 <= getattr(config, low) < getattr(config, high) <= 1e6:
            raise ConfigError(
                f"--{low} {getattr(config, low)} must be below --{high} {getattr(config, high)}, and both in 1e-6..1e6; "
                f"use {pair}"
            )
    if config.rope_attention_factor is not None and not 1e-6 <= config.rope_attention_factor <= 1e6:
        raise ConfigError(f"--rope_attention_factor {config.rope_attention_factor} must be in 1e-6..1e6; use 1.0")


def _check_layers(config: ModelConfig) -> None:
    """Check the rules on options for single layers. Raises: ConfigError."""
    last = config.num_layer - 1
    for name in ("sliding_window_layers", "dense_layers"):
        if wrong := [layer for layer in getattr(config, name) if not 0 <= layer <= last]:
            raise ConfigError(f"--{name} {wrong[0]} is not a layer of --num_layer {config.num_layer}; use 0 to {last}")
    if config.sliding_window_layers and not config.sliding_window:
        raise ConfigError("--sliding_window_layers needs --sliding_window; use --sliding_window 4096")
    if not config.use_moe or config.moe_layers:
        return
    if config.first_k_dense >= config.num_layer:
        raise ConfigError(
            f"--first_k_dense {config.first_k_dense} leaves no expert layer of --num_layer {config.num_layer}; "
            f"use at most {last}, or drop --use_moe"
        )
    raise ConfigError(
        f"--dense_layers {' '.join(map(str, config.dense_layers))} leaves no expert layer of --num_layer "
        f"{config.num_layer}; leave one out, or drop --use_moe"
    )
