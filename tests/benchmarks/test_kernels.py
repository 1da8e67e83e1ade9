"""benchmarks/kernels.py: what it compares is one function, and without a CUDA device it says so."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from tests.helpers.runs import ROOT
from tests.helpers.triton_interpreter import interpreted

interpreted("triton_loss")


def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    text = "benchmarks/kernels.py needs a CUDA device: nothing of Triton's speed can be measured on a CPU\n"
    assert (done.returncode, done.stderr, done.stdout) == (1, text, "")


def test_eager_and_triton_are_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    torch.manual_seed(0)
    names = []
    for op in importlib.import_module("kernels").operations(torch.device("cpu"), torch.float32, 12, 32, 100):
        names.append(op.name.split(",")[0])
        assert op.moved > 0
        if names[-1] == "rows of the loss":
            continue  # it overwrites what it reads
        for one, other in zip(_tensors(op.triton()), _tensors(op.eager()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert names == [
        "rows of the loss", "head and loss", "dispatch", "combine", "x xT", "b A + c A A", "orthogonalize"
    ]  # fmt: skip


def _tensors(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)  # type: ignore[call-overload]
