"""Which library multiplies fp32 matrices on a CPU.

torch hands 16-bit products to oneDNN and fp32 ones to its BLAS (MKL), which on AMD CPUs uses half of the vectors. oneDNN
gets those, too, when it is permitted to round inputs to bf16 (precision "medium"); it makes use of that permission only
where the CPU has matrix units (AMX), and computes in fp32 elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_SETTINGS: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_SIZE = 192  # of the products that are compared; above the size from which torch asks oneDNN


@contextlib.contextmanager
def onednn() -> Iterator[None]:
    """Inside, oneDNN multiplies fp32 matrices, and may round inputs to bf16: exact, if they are bf16 already."""
    before = _SETTINGS.fp32_precision
    _SETTINGS.fp32_precision = "bf16"
    try:
        yield
    finally:
        _SETTINGS.fp32_precision = before


def onednn_keeps_fp32() -> bool:
    """Whether oneDNN's fp32 products are exact here, tried out: against fp64 they may not be off by more than four times
    what the BLAS is off."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, _SIZE, _SIZE, generator=generator)
    exact = a.double() @ b.double()

    def error() -> float:
        return float((a @ b - exact).abs().max())

    allowed = 4 * error()
    with onednn():
        return error() <= allowed


def use_onednn() -> None:
    """Let oneDNN multiply fp32 matrices from now on, in all of this process."""
    # The same setting by its older name: torch's getter, which torch.compile calls too, refuses what the newer one set.
    torch.set_float32_matmul_precision("medium")
