"""The device of the gpu tests: a GPU, or the CPU in a rehearsal.

    pytest -m gpu tests/gpu                                on a machine with a GPU
    TINYTRON_REHEARSE_GPU=1 pytest -m gpu tests/gpu        anywhere else, in seconds (full: at real sizes, in minutes)

A rehearsal runs the tests' own lines at toy sizes, over stand-ins for ``torch.cuda`` (benchmarks/gpu/stand_in.py), Triton's
interpreter and torch's varlen operators in plain torch. It shows that a test would run, and whether a step is capturable;
what only a GPU can show (bytes, another device's rounding) is skipped with a reason, after the lines before it have run.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from tests.helpers.runs import ROOT
from tests.helpers.varlen import varlen_on_cpu
from tinytron.training import build
from tinytron.utils.training import use_deterministic_kernels

T = TypeVar("T")
REHEARSING = os.environ.get("TINYTRON_REHEARSE_GPU", "") in ("1", "full")
TOY = os.environ.get("TINYTRON_REHEARSE_GPU") == "1"
DEVICE = torch.device("cpu" if REHEARSING else "cuda")
GPU_TEST = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (REHEARSING or torch.cuda.is_available()), reason="no CUDA device (TINYTRON_REHEARSE_GPU=1 rehearses)"
    ),
]
if torch.cuda.is_available():  # cuBLAS reads it once, before the first deterministic run of this process may come
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def sized(real: T, rehearsed: T) -> T:
    """``real``, or in a rehearsal something smaller."""
    return rehearsed if TOY else real


def only_a_gpu_shows(what: str) -> None:
    """End a rehearsed test here: the assertions that follow say something about a GPU alone."""
    if REHEARSING:
        pytest.skip(f"rehearsed up to here; only a GPU shows {what}")


@contextlib.contextmanager
def no_host_waits() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the device raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def host_waits() -> Iterator[list[str]]:
    """Inside, operations that make the host wait for the device are collected, as torch's warnings."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [text for one in caught if "called a synchronizing CUDA operation" in (text := str(one.message))]


@contextlib.contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """Inside, fp32 products are computed as torch's ``setting`` says: ``highest`` without TF32, ``high`` with it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Inside, torch is in its deterministic mode."""
    use_deterministic_kernels()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def own_process_state() -> Iterator[None]:
    """What a training run changes for all of its process, restored: process groups, matmul precision, deterministic mode.
    The memory of what was made inside is given back."""
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(False)
        if not REHEARSING:
            gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def stand_ins(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a rehearsal, what stands in for a GPU."""
    if not REHEARSING:
        yield
        return
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.insert(0, str(ROOT / "benchmarks"))
    importlib.import_module("gpu.stand_in").install(patch.setattr)
    patch.setattr(build, "check_device", lambda kernels, device, dtype: None)  # which ask for a CUDA device
    # Everything but inductor, which needs a C++ compiler and half a minute.
    patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with varlen_on_cpu():
        yield


def relative_error(mine: Any, exact: Any) -> float:
    """Norm of the difference over the norm of ``exact``, in fp64 on the CPU; zero if both are zero."""
    mine, exact = (torch.as_tensor(x).detach().double().cpu() for x in (mine, exact))
    assert mine.shape == exact.shape
    difference = float((mine - exact).norm())
    return difference / float(exact.norm()) if difference else 0.0
