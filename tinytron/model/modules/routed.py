"""The tokens that the routers' statistics and losses count, and the scale of those losses.

The balance and z terms are sums over tokens, while the objective is divided by the number of targets. So they are
multiplied by targets per token, which makes them means over tokens regardless of how many labels are ignored. Padding does
not count as a token here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.utils.sequences import IGNORE_INDEX, Documents, documents_without_target


class RoutedTokens(NamedTuple):
    """This rank's tokens, as the routers' losses count them."""

    padding_Bs: torch.Tensor | None  # true for padding; None: nothing is padded
    number: torch.Tensor  # number of tokens that are not padding, int64 scalar
    scale: torch.Tensor  # factor for sums over these tokens in the objective


def routed_tokens(
    labels_Bs: torch.Tensor,
    weights_Bs: torch.Tensor | None,
    padding_Bs: torch.Tensor | None,
    documents: Documents | None,
    scale: torch.Tensor | None,
    state: ParallelState | None,
) -> RoutedTokens:
    """The tokens to count in a batch. If the batch comes with a ``scale``, that and ``padding`` are used as they are; the
    trainer computes a step's scale from all its micro-batches on all ranks.

    Otherwise documents without a target count as padding, and the scale is the targets' weight divided by the number of
    tokens in these sequences. In that case the call is collective over the ranks that share the sequences.
    """
    if scale is not None:
        return RoutedTokens(padding_Bs, _count(labels_Bs, padding_Bs), scale)
    shared = state is not None and state.layout.sep > 1

    def total(tensor: torch.Tensor) -> torch.Tensor:
        return sum_over(tensor, state.groups["sep"]) if state is not None and shared else tensor

    if padding_Bs is None and documents is not None:
        s = labels_Bs.shape[1]
        place = {"first": state.group_rank("sep") * s, "S": state.layout.sep * s} if state is not None else {}
        padding_Bs = documents_without_target(documents, labels_Bs, weights_Bs, total=total, **place)
    number = _count(labels_Bs, padding_Bs)
    valid_Bs = labels_Bs != IGNORE_INDEX
    targets = (valid_Bs if weights_Bs is None else weights_Bs * valid_Bs).sum(dtype=torch.float64)
    all_targets, all_tokens = total(torch.stack([targets, number.double()]))
    return RoutedTokens(padding_Bs, number, all_targets / all_tokens.clamp(min=1))


def _count(labels_Bs: torch.Tensor, padding_Bs: torch.Tensor | None) -> torch.Tensor:
    if padding_Bs is None:
        return torch.full((), labels_Bs.numel(), device=labels_Bs.device)
    return (~padding_Bs).sum()
