"""Facts about rows of tokens that data, kernels and model share: ignored labels, document boundaries, attention masks.

Letters: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

IGNORE_INDEX = -100  # a label that is not a target


class Documents(NamedTuple):
    """The document boundaries in a flattened batch: tokens of different documents do not attend to each other.

    ``cu_seqlens`` is int32 ``[n_documents + 1]``, ascending from 0 to B * S, and includes the start of every row (a
    document never spans two rows). ``max_len`` is the length of the longest document in tokens. ``mask``
    ``[B, 1, S, S]`` is for backends that do not take boundaries; they add it to the scores: 0 where a query (row) may
    attend to a key (column), else -inf.
    """

    cu_seqlens: torch.Tensor
    max_len: int
    mask: torch.Tensor | None = None

    def with_mask(self, B: int, S: int, dtype: torch.dtype, window: int = 0) -> Documents:
        """The documents with a mask, which is built unless it exists; all layers with the same ``window`` (0: no limit) can
        share it. The mask has the queries' ``dtype``, because every layer would convert a boolean mask and keep its copy
        for the backward pass."""
        if self.mask is not None:
            return self
        token = torch.arange(B * S, dtype=torch.int32, device=self.cu_seqlens.device)
        document_BS = torch.searchsorted(self.cu_seqlens, token, right=True).view(B, 1, S)
        seen_BSS = (document_BS.mT == document_BS).tril_()
        if window:
            seen_BSS.triu_(1 - window)
        mask_BSS = torch.full(seen_BSS.shape, float("-inf"), dtype=dtype, device=token.device)
        return self._replace(mask=mask_BSS.masked_fill_(seen_BSS, 0.0).unsqueeze(1))


def documents_of(positions_BS: torch.Tensor) -> Documents:
    """The documents of rows whose positions restart at 0 at the start of every document, and so of every row.
    ``positions_BS`` are for whole sequences (before they are cut among ranks) and are on the host, which reads them."""
    starts_BS = positions_BS == 0
    assert bool(starts_BS[:, 0].all()), "positions must begin at 0 in every row"
    end = torch.tensor([starts_BS.numel()])
    cu_seqlens = torch.cat((starts_BS.flatten().nonzero().squeeze(1), end)).to(torch.int32)
    return Documents(cu_seqlens, int(cu_seqlens.diff().max()))


def documents_without_target(
    documents: Documents,
    labels_Bs: torch.Tensor,
    weights_Bs: torch.Tensor | None = None,
    *,
    first: int = 0,
    S: int | None = None,
    total: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """A mask of the tokens in documents without any target of a weight above 0, bool ``[B, s]``. In data that does not mark
    its padding, the unused end of a row looks like this. A document of a single token may be the last token of a text, so
    it does not count as padding.

    ``labels_Bs`` is the part of the rows that begins at column ``first`` of ``S``; ``total`` sums the documents' target
    counts, int64 ``[n_documents]``, over all parts.
    """
    B, s = labels_Bs.shape
    row_B1 = torch.arange(B, device=labels_Bs.device).unsqueeze(1) * (S or s)
    token_Bs = row_B1 + torch.arange(first, first + s, device=labels_Bs.device)
    document_Bs = torch.searchsorted(documents.cu_seqlens, token_Bs.to(torch.int32), right=True) - 1
    lengths = documents.cu_seqlens.diff()
    targets = torch.zeros(lengths.shape, dtype=torch.int64, device=labels_Bs.device)
    valid_Bs = labels_Bs != IGNORE_INDEX
    if weights_Bs is not None:
        valid_Bs &= weights_Bs != 0
    targets.scatter_add_(0, document_Bs.flatten(), valid_Bs.flatten().long())
    if total is not None:
        targets = total(targets)
    return ((targets == 0) & (lengths > 1))[document_Bs]


def rows_as_documents(B: int, S: int, device: torch.device) -> Documents:
    """The documents of a batch in which every row is one document."""
    return Documents(torch.arange(0, B * S + 1, S, dtype=torch.int32, device=device), S)


def visible(
    documents: Documents | None, window: int, B: int, S: int, dtype: torch.dtype, device: torch.device
) -> Documents | None:
    """The mask of a layer with ``window`` (0: no limit): ``documents`` with their mask; without documents the mask of the
    window, ``[1, 1, S, S]`` for all rows; or ``None`` if every token attends to all tokens before it."""
    window = window if window < S else 0
    if documents is not None:
        return documents.with_mask(B, S, dtype, window)
    if not window:
        return None
    return rows_as_documents(B, S, device).with_mask(1, S, dtype, window)
