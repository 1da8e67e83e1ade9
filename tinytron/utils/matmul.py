"""The library that multiplies fp32 matrices on a CPU.

torch uses oneDNN for 16-bit products, and for fp32 products its BLAS (MKL), which uses only half the vector width on AMD
CPUs. torch also uses oneDNN for the latter if rounding inputs to bf16 is permitted (precision "medium"). oneDNN makes
use of that permission only if the CPU has matrix units (AMX); otherwise it computes in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_SETTINGS: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_SIZE = 192  # size of the products to compare, large enough for torch to use oneDNN


@contextlib.contextmanager
def onednn(precision: str = "bf16") -> Iterator[None]:
    """Inside this context oneDNN multiplies fp32 matrices and may round inputs to bf16, which is exact if their values
    already are bf16. With ``"ieee"`` the BLAS multiplies them instead."""
    before = _SETTINGS.fp32_precision
    _SETTINGS.fp32_precision = precision
    try:
        yield
    finally:
        _SETTINGS.fp32_precision = before


def onednn_keeps_fp32() -> bool:
    """True if oneDNN's fp32 products are exact on this machine. A trial decides: compared with fp64, their error may
    be at most four times the BLAS's."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, _SIZE, _SIZE, generator=generator)
    exact = a.double() @ b.double()

    def error() -> float:
        return float((a @ b - exact).abs().max())

    with onednn("ieee"):  # also in a process that already uses oneDNN
        allowed = 4 * error()
    with onednn():
        return error() <= allowed


def use_onednn() -> None:
    """Use oneDNN for fp32 matrices from now on, in the whole process."""
    # The setting's older name, because torch's getter, which torch.compile also calls, rejects values set by the newer one.
    torch.set_float32_matmul_precision("medium")
