"""Our Triton kernels on a CPU, in Triton's interpreter, which tests/conftest.py chooses where there is no CUDA device.

It runs one program after the other on numpy arrays: it shows what a kernel computes, not races, layouts or speed.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.runs import ROOT


def interpreted(module: str) -> Any:
    """``tinytron.kernels.<module>``; at the top of a test file, which is skipped where that cannot be interpreted."""
    if torch.cuda.is_available():
        pytest.skip("on a CUDA device the kernels are tested by tests/gpu/test_triton_cuda.py", allow_module_level=True)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    if problem := importlib.import_module("gpu.stand_in").interpreter_problem():
        pytest.skip(problem, allow_module_level=True)
    _mend_bfloat16()
    return importlib.import_module(f"tinytron.kernels.{module}")


def _mend_bfloat16() -> None:
    """The interpreter holds bf16 as the bits in uint16. It cuts fp32 off where a GPU rounds, and multiplies bits."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    tl = importlib.import_module("triton.language")
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot
    if plain_cast.__module__ == __name__:
        return

    def rounded(data: Any) -> Any:
        return torch.tensor(data, dtype=torch.float32).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def widened(data: Any) -> Any:
        return (data.astype(np.uint32) << 16).view(np.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return handle(rounded(src.data), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = handle(widened(a.data), tl.float32), handle(widened(b.data), tl.float32)
        return plain_dot(self, a, b, *more)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


def near(mine: torch.Tensor, exact: torch.Tensor, *, ulps: float = 1.0) -> None:
    """Assert that ``mine`` is ``exact`` (fp64) rounded once to its precision; fp32, in which all is computed, may be off by
    ``ulps`` of the largest element."""
    error = (mine.double() - exact).abs()
    computed = ulps * torch.finfo(torch.float32).eps * exact.abs().amax() if exact.numel() else 0.0
    rounding = torch.finfo(mine.dtype).eps / 2 if mine.dtype != torch.float32 else 0.0
    tiny = 0.0 if mine.dtype == torch.float32 else torch.finfo(mine.dtype).smallest_normal * torch.finfo(mine.dtype).eps
    assert (error <= rounding * exact.abs() + computed + tiny).all(), f"off by up to {error.max()}"
