"""One matrix product for all experts of a rank, and the padding that keeps it fast on CPUs.

Letters: e experts, Q rows grouped by expert, D and F widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

ROW_STEP = 32  # on CPUs an expert's rows are padded to a multiple of this


def has_grouped_product(weight_eFD: torch.Tensor) -> bool:
    """True if torch has a single product for all experts: in bf16, or on CPUs in fp32, with widths of whole 16 bytes."""
    fits = weight_eFD.dtype == torch.bfloat16 or (weight_eFD.dtype == torch.float32 and weight_eFD.device.type == "cpu")
    return fits and all(width * weight_eFD.element_size() % 16 == 0 for width in weight_eFD.shape[1:])


def grouped_linear(
    rows_QD: torch.Tensor, weight_eFD: torch.Tensor, rows_e: torch.Tensor, counts: Sequence[int] = ()
) -> torch.Tensor:
    """Multiply each row by its expert's transposed weight: ``[Q, D] -> [Q, F]``; rows are grouped by expert.

    This is one grouped GEMM if torch has one, else one product per expert, for which ``counts`` must have the
    values of ``rows_e`` on the host. Experts without rows get a zero gradient.
    """
    if has_grouped_product(weight_eFD):
        ends_e = rows_e.cumsum(0).to(torch.int32)
        out: torch.Tensor = F.grouped_mm(rows_QD, weight_eFD.transpose(1, 2), offs=ends_e)
        return out
    return looped_linear(rows_QD, weight_eFD, counts)


def looped_linear(rows_QD: torch.Tensor, weight_eFD: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """``grouped_linear`` as one product per expert, for any dtype and device."""
    rows = rows_QD.split(list(counts))
    return torch.cat([its @ weight.t() for its, weight in zip(rows, weight_eFD, strict=True)])


def padded_count(rows_QD: torch.Tensor, counts: Sequence[int]) -> int | None:
    """The number of rows that ``pad_rows`` makes of ``counts``; ``None`` if padding is not worthwhile.

    oneDNN compiles one kernel per row count, which costs as much as the product; padding keeps distinct
    counts few.
    """
    if rows_QD.is_cuda:
        return None
    return sum(-(-count // ROW_STEP) * ROW_STEP for count in counts)


def pad_rows(
    rows_QD: torch.Tensor, rows_e: torch.Tensor, padded: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad each expert's rows with zeros to a multiple of ``ROW_STEP``, to ``padded`` rows in total (from
    ``padded_count``). Returns the padded rows, the number of rows that each expert now has, and the new
    place of every old row ``[Q]``."""
    wide_e = (rows_e + ROW_STEP - 1) // ROW_STEP * ROW_STEP
    shift_e = (wide_e.cumsum(0) - wide_e) - (rows_e.cumsum(0) - rows_e)
    place_Q = torch.arange(len(rows_QD), device=rows_QD.device)
    place_Q += shift_e.repeat_interleave(rows_e, output_size=len(rows_QD))
    padded_QD = rows_QD.new_zeros(padded, rows_QD.shape[1]).index_copy(0, place_Q, rows_QD)
    return padded_QD, wide_e, place_Q
