"""A training forward pass of the GPT in its parts, for losses of hidden states: preferences, rewards, a reference."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tinytron.data import Batch
from tinytron.distributed.parallel_state import ParallelState
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums, fused_linear_cross_entropy
from tinytron.model.modules.moe import MoEStats
from tinytron.model.modules.routed import RoutedTokens, routed_tokens


class ForwardPass(NamedTuple):
    """Hidden states ``[B, s, D]``, whose head's parameters have arrived, and what the routers' losses need, if there are
    experts."""

    hidden_BsD: torch.Tensor
    stats: list[MoEStats]
    routed: RoutedTokens | None

    def with_routing_losses(self, model: GPT, sums: LossSums) -> LossSums:
        """``sums`` and the losses of the routers, if there are any."""
        return sums if self.routed is None else model.add_routing_losses(sums, self.stats, self.routed)


def forward_pass(model: GPT, batch: Batch, state: ParallelState) -> ForwardPass:
    """Run ``model`` up to its head. Collective over ``state``'s groups, as the model is."""
    routed = None
    if model.moe_layers:
        routed = routed_tokens(batch.labels, batch.weights, batch.padding, batch.documents, batch.routing_scale, state)
    unseen = None if routed is None else routed.padding_Bs
    x_BsD, stats = model.hidden_states(batch.input_ids, batch.positions, batch.documents, padding_Bs=unseen)
    model.wait_for_params(model.lm_head)
    return ForwardPass(x_BsD, stats, routed)


def cross_entropy(model: GPT, x_BsD: torch.Tensor, batch: Batch, weights_Bs: torch.Tensor | None = None) -> LossSums:
    """The fused loss of hidden states, with ``weights_Bs``, which may be negative, instead of those of the ``batch``."""
    return fused_linear_cross_entropy(
        x_BsD.flatten(0, 1),
        model.lm_head.weight,
        batch.labels.flatten(),
        weights_T=None if weights_Bs is None else weights_Bs.flatten(),
        by="torch" if model.kernels.cross_entropy == "cut" else model.kernels.cross_entropy,
    )
