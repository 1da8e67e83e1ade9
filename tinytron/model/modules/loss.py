"""The training loss: output head and cross entropy, computed as sums."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from tinytron.errors import ConfigError
from tinytron.kernels.choice import LossKernel
from tinytron.kernels.cross_entropy import linear_cross_entropy
from tinytron.utils.sequences import IGNORE_INDEX


class LossSums(NamedTuple):
    """Loss sums over the valid targets, each multiplied by its weight.

    ``objective`` is the value to differentiate, ``token`` the plain cross entropy in nats (detached). They
    differ by the weighted auxiliary terms: the z-loss, and the terms in ``aux`` (detached and unweighted, by
    name). ``per_token`` is every target's cross entropy (detached, in nats, not multiplied by its weight;
    zero where the label is ignored): ``[T]``, or ``[B, s]`` when it comes from the model.

    ``counts`` has, by name, the number of items that a value of ``aux`` is summed over, such as the number of
    routed tokens. The sums and counts of all ranks and micro-batches give the mean. A value without a count
    is divided like ``token``; ``_replace`` keeps the counts. A sum over anything but targets must be scaled by
    targets per count before it is added to ``objective`` (modules/routed.py).
    """

    objective: torch.Tensor
    token: torch.Tensor
    aux: Mapping[str, torch.Tensor] = MappingProxyType({})
    per_token: torch.Tensor | None = None
    counts: Mapping[str, torch.Tensor] = MappingProxyType({})


def checked_sums(losses: Any) -> LossSums:
    """``losses``, checked, because a custom ``_loss`` may have returned them. Raises: ConfigError unless they are
    ``LossSums`` of scalars; a mean would be divided twice."""
    if not isinstance(losses, LossSums):
        raise ConfigError(
            f"_loss returned a {type(losses).__name__}; return sums, which are divided once, over all ranks: "
            "LossSums(objective=loss_sum, token=loss_sum.detach()), as in examples/own_loss.py"
        )
    for name in ("objective", "token"):
        value = getattr(losses, name)
        if not torch.is_tensor(value) or value.ndim:
            shape = f"a tensor of shape {list(value.shape)}" if torch.is_tensor(value) else f"a {type(value).__name__}"
            raise ConfigError(
                f"_loss returned {shape} as LossSums.{name}, which must be a scalar tensor; use its .sum()"
            )
    return losses


def fused_linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    weights_T: torch.Tensor | None = None,
    z_loss_coef: float = 0.0,
    chunk_tokens: int | None = None,
    by: LossKernel = "torch",
) -> LossSums:
    """Loss sums for the logits ``hidden @ weight.T``, which are never in memory as a whole.

    Labels equal to ``IGNORE_INDEX`` count as zero, the others ``weights_T`` times (default 1). Nothing is
    averaged: divide by the sum of the weights of the valid targets of the *global* batch. Formula, precision,
    ``chunk_tokens`` and ``by`` are as in ``kernels.cross_entropy.linear_cross_entropy``.
    """
    objective, token, per_token = linear_cross_entropy(
        hidden_TD,
        weight_VD,
        labels_T,
        ignore_index=IGNORE_INDEX,
        weights_T=weights_T,
        z_loss_coef=z_loss_coef,
        chunk_tokens=chunk_tokens,
        by=by,
    )
    return LossSums(objective, token, per_token=per_token)
