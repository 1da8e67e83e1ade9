"""The training loss: output head and cross entropy, as sums."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

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
    count is divided like ``token``. In ``objective`` a sum with another count than the targets must be
    scaled by targets per count (modules/routed.py).
    """

    objective: torch.Tensor
    token: torch.Tensor
    aux: Mapping[str, torch.Tensor] = MappingProxyType({})
    per_token: torch.Tensor | None = None
    counts: Mapping[str, torch.Tensor] = MappingProxyType({})


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
