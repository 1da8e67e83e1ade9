"""The symmetric products in Muon's iteration: a matrix times its transpose, and a quadratic polynomial of the result.

``triton`` uses gram_triton.py, which computes half of a symmetric product and mirrors it (not in fp64).
"""

from __future__ import annotations

import torch

from tinytron.kernels.choice import TritonKernel


def fuses(by: TritonKernel, dtype: torch.dtype) -> bool:
    """True if our Triton kernels compute products in ``dtype``."""
    return by == "triton" and dtype != torch.float64


def gram(x: torch.Tensor, by: TritonKernel = "torch") -> torch.Tensor:
    """``x @ x.mT``: ``[..., m, n] -> [..., m, m]`` in the precision of ``x``."""
    if fuses(by, x.dtype):
        from tinytron.kernels import gram_triton  # needs the triton package

        return gram_triton.gram(x)
    return x @ x.mT


def plus_square(a: torch.Tensor, b: float, c: float, by: TritonKernel = "torch") -> torch.Tensor:
    """``b a + c a @ a`` for symmetric ``a``: ``[..., m, m] -> [..., m, m]`` in its precision."""
    if fuses(by, a.dtype):
        from tinytron.kernels import gram_triton  # needs the triton package

        return gram_triton.plus_square(a, b, c)
    return b * a + c * (a @ a)
