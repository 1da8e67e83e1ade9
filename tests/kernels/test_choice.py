"""The choice of kernels: what the flags mean, and what is not loaded unless it is chosen."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from tests.helpers.runs import ROOT
from tinytron.errors import ConfigError
from tinytron.kernels.choice import DEFAULT, Kernels, check_model


def test_the_flags_choose() -> None:
    assert Kernels.from_flags() == DEFAULT
    assert Kernels.from_flags(attn_backend="math") == Kernels(attention="math")
    assert Kernels.from_flags(use_liger_kernel=True) == Kernels(rms_norm="liger", swiglu="liger")
    triton = Kernels(cross_entropy="triton", expert_rows="triton", gram="triton")
    assert Kernels.from_flags(use_triton_kernels=True) == triton
    both = Kernels.from_flags(use_triton_kernels=True, use_cut_cross_entropy=True)
    assert both == dataclasses.replace(triton, cross_entropy="cut")


@pytest.mark.parametrize("flag", ["use_liger_kernel", "use_triton_kernels"])
def test_fp64_is_for_torch(flag: str) -> None:
    kernels = Kernels.from_flags(**{flag: True})  # type: ignore[arg-type]
    check_model(kernels, "fp32", head_dim=64, dropout=0.0)
    with pytest.raises(ConfigError, match=rf"--{flag} computes in fp32, not in --precision fp64; use fp32"):
        check_model(kernels, "fp64", head_dim=64, dropout=0.0)


def test_importing_the_library_loads_no_compiler_and_no_package() -> None:
    """torch's compiler alone takes longer to load than everything else together."""
    slow = ("triton", "torch._dynamo", "torch._inductor", "liger_kernel", "cut_cross_entropy", "flash_attn")
    code = f"import sys, tinytron.training; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
