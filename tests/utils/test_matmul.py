"""Who multiplies fp32 matrices: only a library that keeps fp32's precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of
from tinytron.training import Trainer
from tinytron.utils import matmul

real = torch.Tensor.__matmul__


def as_with_matrix_units(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What oneDNN does on a CPU with AMX once it may."""
    if a.dtype == torch.float32 and matmul._SETTINGS.fp32_precision == "bf16":
        return real(a.bfloat16().float(), b.bfloat16().float())
    return real(a, b)


def test_rounded_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("medium")  # as an earlier run in the same process leaves it
    before = matmul._SETTINGS.fp32_precision
    monkeypatch.setattr(torch.Tensor, "__matmul__", as_with_matrix_units)
    assert not matmul.onednn_keeps_fp32()
    monkeypatch.setattr(torch.Tensor, "__matmul__", real)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not matmul.onednn_keeps_fp32()
    assert matmul._SETTINGS.fp32_precision == before
    torch.set_float32_matmul_precision("highest")


def test_the_setting_is_given_back_after_an_error() -> None:
    before = matmul._SETTINGS.fp32_precision
    inside = ""

    def fail() -> None:
        nonlocal inside
        with matmul.onednn():
            inside = matmul._SETTINGS.fp32_precision
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside == "bf16"
    assert matmul._SETTINGS.fp32_precision == before


def chosen(log_dir: Path, *flags: object) -> tuple[str, bool, float]:
    """What a run multiplies with, whether it may, and the error of a product. A job for the pool."""
    Trainer(config_of(*TINY, "--log_dir", log_dir, "--exp_name", f"r{len(flags)}", *flags))
    a, b = torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(3))
    error = float((a @ b - a.double() @ b.double()).abs().max())
    setting: str = matmul._SETTINGS.fp32_precision
    torch.set_float32_matmul_precision("high")
    return setting, matmul.onednn_keeps_fp32(), error


def test_runs_choose(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    setting, may, error = ranks(1).run(chosen, tmp_path)[0]
    assert (setting == "bf16") == may
    assert error < 1e-3  # products of numbers rounded to bf16 are off by 0.05
    assert ranks(1).run(chosen, tmp_path, "--disable_tf32")[0][0] == "ieee"
