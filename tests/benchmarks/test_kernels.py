"""benchmarks/kernels.py: what it compares is one function, and without a CUDA device it says so."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch

from tests.helpers.runs import ROOT
from tests.helpers.triton_interpreter import interpreted

interpreted("cross_entropy_triton")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("kernels")


def test_without_a_gpu_it_says_so(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    text = r"^benchmarks/kernels.py needs a CUDA device: nothing of Triton's speed can be measured on a CPU$"
    with pytest.raises(SystemExit, match=text):
        kernels.main()


def test_eager_and_triton_are_one_function(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    torch.manual_seed(0)
    names = []
    for op in kernels.operations(torch.device("cpu"), torch.float32, 12, 32, 100):
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
