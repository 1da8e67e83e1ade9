"""RMSNorm and SwiGLU by the Triton kernels of the liger-kernel package (arXiv:2410.10989), which ``--use_liger_kernel``
asks for. The same functions as torch's, rounding apart; statistics and products in fp32.

Its rotary embedding is left out: it wants queries and keys as contiguous tensors of their own, which it overwrites, where
``rotate`` turns both in one pass out of the packed projection. Its loss is that of modules/loss.py in idea.
"""

from __future__ import annotations

import importlib

import torch

from tinytron.kernels.choice import check_package

_MODULE = "liger_kernel.ops"


def check_liger(device: torch.device) -> None:
    """Raises: ConfigError if the kernels cannot run on ``device``, or the package is missing or too old."""
    names = ("LigerRMSNormFunction", "LigerFusedGateUpSiLUMulFunction")
    check_package("use_liger_kernel", "liger-kernel", _MODULE, names, device)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension; ``[..., D] -> [..., D]``."""
    # "gemma": all of it in fp32, rounded once at the end, as torch's rms_norm does ("llama" rounds before the weight).
    # Not in place: the gradient that comes in may have other readers.
    out: torch.Tensor = importlib.import_module(_MODULE).LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)
    return out


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``[..., 2F]``, gate first: ``[..., F]``. The halves are not copied."""
    out: torch.Tensor = importlib.import_module(_MODULE).LigerFusedGateUpSiLUMulFunction.apply(gate_up)
    return out
