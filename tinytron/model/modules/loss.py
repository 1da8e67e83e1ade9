"""The training loss: output head and cross entropy, computed as sums."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

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

    ``hits`` is the number of targets with a weight above 0 whose label is the likeliest token, int64; ``None`` if the
    model did not count them.
    """

    objective: torch.Tensor
    token: torch.Tensor
    aux: Mapping[str, torch.Tensor] = MappingProxyType({})
    per_token: torch.Tensor | None = None
    counts: Mapping[str, torch.Tensor] = MappingProxyType({})
    hits: torch.Tensor | None = None


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
    count_hits: bool = False,
) -> LossSums:
    """Loss sums for the logits ``hidden @ weight.T``, which are never in memory as a whole.

    Labels equal to ``IGNORE_INDEX`` count as zero, the others ``weights_T`` times (default 1). Nothing is
    averaged: divide by the sum of the weights of the valid targets of the *global* batch. Formula, precision,
    ``chunk_tokens``, ``by`` and ``count_hits`` are as in ``kernels.cross_entropy.linear_cross_entropy``.
    """
    objective, token, per_token, hits = linear_cross_entropy(
        hidden_TD,
        weight_VD,
        labels_T,
        ignore_index=IGNORE_INDEX,
        weights_T=weights_T,
        z_loss_coef=z_loss_coef,
        chunk_tokens=chunk_tokens,
        by=by,
        count_hits=count_hits,
    )
    return LossSums(objective, token, per_token=per_token, hits=hits if count_hits else None)


def cross_entropy_of_logits(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    weights_T: torch.Tensor | None = None,
    z_loss_coef: float = 0.0,
    count_hits: bool = False,
) -> LossSums:
    """Loss sums for logits that exist as a whole, by the same formula as ``fused_linear_cross_entropy``, which takes less
    memory where the head is a matrix."""
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    nll_T = F.cross_entropy(logits_TV, labels_T, reduction="none", ignore_index=IGNORE_INDEX)
    counted_T = (labels_T != IGNORE_INDEX).to(logits_TV.dtype)
    if weights_T is not None:
        counted_T = counted_T * weights_T
    token = (nll_T * counted_T).sum()
    objective = token
    if z_loss_coef:
        objective = token + z_loss_coef * (logits_TV.logsumexp(1).square() * counted_T).sum()
    hits = ((logits_TV.argmax(1) == labels_T) & (counted_T > 0)).sum() if count_hits else None
    return LossSums(objective, token.detach(), per_token=nll_T.detach(), hits=hits)
