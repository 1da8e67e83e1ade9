"""Output head and cross entropy by the kernels of the cut-cross-entropy package (arXiv:2411.09009), which
``--use_cut_cross_entropy`` asks for. Letters as in loss.py."""

from __future__ import annotations

import importlib

import torch

from tinytron.kernels.packages import check_package
from tinytron.model.modules.loss import LossSums
from tinytron.utils.sequences import IGNORE_INDEX


def check_cut_cross_entropy(device: torch.device) -> None:
    """Raises: ConfigError if the kernels cannot run on ``device``, or the package is missing."""
    names = ("linear_cross_entropy",)
    check_package("use_cut_cross_entropy", "cut-cross-entropy", "cut_cross_entropy", names, device)


def cut_linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    weights_T: torch.Tensor | None = None,
    z_loss_coef: float = 0.0,
) -> LossSums:
    """``fused_linear_cross_entropy`` without z-loss, in bf16 or fp16: no logits in memory at all, not even of a chunk.

    The package leaves out gradients below the inputs' precision (its ``filter_eps``), sums the weight's gradient in that
    precision and in no fixed order, and counts the valid labels, for which the host waits. Raises: ValueError for a
    ``z_loss_coef``: the package does not give the log-partition.
    """
    if z_loss_coef:
        raise ValueError(f"z_loss_coef {z_loss_coef} does not go with cut_linear_cross_entropy; use 0")
    if not torch.is_grad_enabled():
        weight_VD = weight_VD.detach()  # or it would prepare for gradients
    package = importlib.import_module("cut_cross_entropy")
    # Per target: only then can they be weighted, and only then does the loss of each come out.
    nll_T = package.linear_cross_entropy(hidden_TD, weight_VD, labels_T, ignore_index=IGNORE_INDEX, reduction="none")
    nll_T = nll_T.to(torch.promote_types(nll_T.dtype, torch.float32))
    objective = (nll_T if weights_T is None else nll_T * weights_T.to(nll_T.dtype)).sum()
    return LossSums(objective, objective.detach(), per_token=nll_T.detach())
