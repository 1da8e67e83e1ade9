"""Stand-ins for packages that need a GPU: the signatures of the real ones (liger-kernel 0.8.5, cut-cross-entropy 25.1.1),
computed in plain torch."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F


def liger_ops(calls: Counter[str]) -> SimpleNamespace:
    """``liger_kernel.ops``."""

    class LigerRMSNormFunction:
        @staticmethod
        def apply(
            X: torch.Tensor, W: torch.Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama",
            in_place: bool = True, row_mode: Any = None,
        ) -> torch.Tensor:  # fmt: skip
            calls["rms_norm"] += 1
            assert (casting_mode, in_place) == ("gemma", False)
            wide = X.to(torch.promote_types(X.dtype, torch.float32))
            normal = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
            return (normal * (offset + W.to(wide.dtype))).to(X.dtype)

    class LigerFusedGateUpSiLUMulFunction:
        @staticmethod
        def apply(y: torch.Tensor, in_place: bool = False) -> torch.Tensor:
            calls["swiglu"] += 1
            assert not in_place
            gate, up = y.chunk(2, dim=-1)
            return F.silu(gate) * up

    return SimpleNamespace(
        LigerRMSNormFunction=LigerRMSNormFunction, LigerFusedGateUpSiLUMulFunction=LigerFusedGateUpSiLUMulFunction
    )


def cut_cross_entropy(calls: Counter[str]) -> SimpleNamespace:
    """``cut_cross_entropy``."""

    def linear_cross_entropy(
        e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100, softcap: float | None = None,
        reduction: str = "mean", shift: bool = False, filter_eps: float | str | None = "high", impl: str = "cce",
    ) -> torch.Tensor:  # fmt: skip
        calls["loss"] += 1
        assert e.shape[:-1] == targets.shape
        assert (softcap, shift) == (None, False)
        logits = e @ c.t()
        if logits.dtype != torch.float64:
            logits = logits.float()
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)

    return SimpleNamespace(linear_cross_entropy=linear_cross_entropy)


def install(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Put the stand-ins where the packages would be, and count the calls."""
    calls: Counter[str] = Counter()
    patch.setitem(sys.modules, "liger_kernel.ops", liger_ops(calls))
    patch.setitem(sys.modules, "cut_cross_entropy", cut_cross_entropy(calls))
    return calls
