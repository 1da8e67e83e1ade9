"""The training loss: output head and cross entropy, as sums."""

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
    """Sums over the valid targets, each times its weight.

    ``objective`` is what to differentiate, ``token`` the plain cross entropy in nats (detached). They
    differ by the weighted auxiliary terms: z-loss, and those of ``aux`` (detached and unweighted, by
    name). ``per_token`` is every target's cross entropy (detached, in nats, not times its weight; zero
    where the label is ignored): ``[T]``, from the model ``[B, s]``.

    ``counts`` says what a value of ``aux`` is a sum over, by its name, such as the number of tokens
    that were routed: sums and counts of all ranks and micro-batches give the mean. A value without a
    count is divided like ``token``; ``_replace`` keeps the counts. In ``objective`` a sum that is not
    over targets must be scaled by targets per count (modules/routed.py).
    """

    objective: torch.Tensor
    token: torch.Tensor
    aux: Mapping[str, torch.Tensor] = MappingProxyType({})
    per_token: torch.Tensor | None = None
    counts: Mapping[str, torch.Tensor] = MappingProxyType({})


def checked_sums(losses: Any) -> LossSums:
    """``losses``, which a user's own ``_loss`` may have returned. Raises: ConfigError unless they are ``LossSums`` of
    scalars; a mean would be divided twice."""
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
    """Loss sums of the logits ``hidden @ weight.T``, which are never held as a whole.

    Labels equal to ``IGNORE_INDEX`` count as zero, the others ``weights_T`` times (default 1). Nothing
    is averaged: divide by the sum of the weights of the valid targets of the *global* batch. Formula,
    precision, ``chunk_tokens`` and ``by`` as in ``kernels.cross_entropy.linear_cross_entropy``.
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
