"""Which tokens the routers' statistics and losses count, and by what those losses are scaled.

The balance and z terms are sums over tokens, while an objective is divided by its targets. So they are multiplied by
targets per token, which makes them means over tokens however many labels are ignored. Padding is not a token to them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.utils.sequences import IGNORE_INDEX, Documents, documents_without_target


class RoutedTokens(NamedTuple):
    """This rank's tokens, as the routers' losses count them."""

    padding_Bs: torch.Tensor | None  # true for padding; None: nothing is
    number: torch.Tensor  # of the others, int64 scalar
    scale: torch.Tensor  # what sums over them are multiplied by in the objective


def routed_tokens(
    labels_Bs: torch.Tensor,
    weights_Bs: torch.Tensor | None,
    padding_Bs: torch.Tensor | None,
    documents: Documents | None,
    scale: torch.Tensor | None,
    state: ParallelState | None,
) -> RoutedTokens:
    """The tokens of a batch with its ``padding`` and ``scale``, if its maker knows them: a step's scale is that of all its
    micro-batches on all ranks.

    Else documents without a target are padding, and the scale is the targets' weight over the number of tokens, of
    these sequences. Then it is collective over the ranks that share them.
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
