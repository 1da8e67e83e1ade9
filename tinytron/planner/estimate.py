"""A quick estimate of a run's memory from formulas. The plan itself (memory.py) runs a step on tensors without memory,
which may take minutes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tinytron.distributed.layout import ParallelLayout
from tinytron.model import ModelConfig
from tinytron.model.modules.recompute import Recompute
from tinytron.utils.model import count_parameters


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate of one rank's peak memory in a step with AdamW. It is within a quarter of the plan, and more often too
    low than too high. It leaves out the scores of ``--attn_backend math`` and dropout masks. Sizes are for whole
    sequences. ``frozen`` are further models, of which only the weights are held."""

    dtype: torch.dtype
    batch_size: int
    seq_len: int
    recompute: Recompute = "none"
    shard: bool = True
    on_cpu: bool = False
    averaged: bool = False
    lora_rank: int = 0
    frozen: tuple[ModelConfig, ...] = ()

    def bytes(self, config: ModelConfig, layout: ParallelLayout) -> int:
        """The estimate for a model on a layout, in bytes."""
        # The head's gradient, which the forward pass computes. With adapters the head is frozen.
        head = 0 if self.lora_rank else config.vocab_size * config.hidden_size * 4
        others = sum(_weights_here(other, layout)[0] for other in self.frozen) * self.dtype.itemsize
        return _held(config, self, layout) + _activations(config, self, layout) + head + others


def _weights_here(config: ModelConfig, layout: ParallelLayout) -> tuple[int, int, int]:
    """Number of parameters on a rank, and of those outside of the experts and in all experts."""
    experts = len(config.moe_layers) * config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size
    others = count_parameters(config).total - experts
    return others + experts // layout.ep, others, experts


def _held(config: ModelConfig, work: Estimate, layout: ParallelLayout) -> int:
    here, others, experts = _weights_here(config, layout)
    size = work.dtype.itemsize
    # Two moments, plus main weights if the parameters have 16 bits.
    states = (2 + work.averaged) * max(4, size) + (4 if size < 4 else 0)
    pieces = layout.world_size if work.shard else 1
    owned = others // pieces + experts // max(pieces, layout.ep)
    weights = here * size
    if work.lora_rank:  # everything else is frozen
        here = _adapters(config, work.lora_rank)
        weights, owned = weights + here * size, here // pieces
    gradients = here * max(4, size)
    received = gradients * (pieces - 1) // pieces if work.on_cpu else 0  # gloo's copies of other ranks' gradients
    return weights + gradients + received + owned * states


def _adapters(config: ModelConfig, rank: int) -> int:
    """Number of parameters of adapters on all linear layers: the most that ``--lora_targets`` can choose."""
    hidden, q = config.hidden_size, config.num_attention_heads * config.resolved_head_dim
    kv = config.num_key_value_heads * config.resolved_head_dim
    attention = (hidden + q) + 2 * (hidden + kv) + (q + hidden)
    matrices = 3 if config.mlp_type == "swiglu" else 2
    shared = config.num_shared_experts * config.moe_intermediate_size
    experts = len(config.moe_layers)
    mlps = (config.num_layer - experts) * matrices * (hidden + config.intermediate_size)
    mlps += experts * 3 * (hidden + shared) * bool(shared)
    return rank * (config.num_layer * attention + mlps)


def _activations(config: ModelConfig, work: Estimate, layout: ParallelLayout) -> int:
    """Bytes kept for the backward pass: the outputs of each block's products, and the values between them."""
    tokens = work.batch_size * work.seq_len // layout.sep
    head = config.resolved_head_dim
    heads = head * (config.num_attention_heads + 2 * config.num_key_value_heads)
    inputs = 3 if config.mlp_type == "swiglu" else 2  # tensors of the MLP's width: outputs of matrices and activation
    dense = config.intermediate_size * inputs
    chosen = config.num_experts_per_tok * (config.moe_intermediate_size * inputs + 2 * config.hidden_size)
    mixed = chosen + config.num_shared_experts * config.moe_intermediate_size * inputs
    experts = len(config.moe_layers)
    widths = (config.num_layer - experts) * dense + experts * mixed
    hidden = config.num_layer * config.hidden_size
    if work.recompute == "none":
        elements = 4 * hidden + config.num_layer * heads * 3 // 2 + widths
    else:
        block = (
            4 * config.hidden_size + heads * 3 // 2 + max(dense * (experts < config.num_layer), mixed * (experts > 0))
        )
        kept = hidden if work.recompute == "full" else 2 * hidden + config.num_layer * heads + widths * 2 // 3
        elements = kept + block
    return tokens * elements * work.dtype.itemsize
