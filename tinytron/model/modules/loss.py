"""Output head and cross entropy in one, without ever holding the [tokens, vocabulary] logits.

The gradients are computed in the forward pass, chunk by chunk, while a chunk's logits are at hand: nothing is computed
twice and only one chunk is alive (the idea of Cut Your Losses, arXiv:2411.09009, and Liger, arXiv:2410.10989, in plain
PyTorch). Letters: T tokens, t tokens of one chunk, D model dimension, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from tinytron.utils.sequences import IGNORE_INDEX


class LossSums(NamedTuple):
    """Sums over the valid targets, each times its weight: ``objective`` is what to differentiate, ``token`` the plain
    cross entropy in nats (detached). They differ by the weighted auxiliary terms: z-loss, and those of ``aux`` (detached
    and unweighted, by name). ``per_token`` is every target's cross entropy (detached, in nats, not times its weight; zero
    where the label is ignored): ``[T]``, from the model ``[B, s]``."""

    objective: torch.Tensor
    token: torch.Tensor
    aux: Mapping[str, torch.Tensor] = MappingProxyType({})
    per_token: torch.Tensor | None = None


def fused_linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    weights_T: torch.Tensor | None = None,
    z_loss_coef: float = 0.0,
    chunk_tokens: int | None = None,
    by_triton: bool = False,
) -> LossSums:
    """Sum over tokens of ``weight * (-log softmax(hidden @ weight.T)[label] + z_loss_coef * logsumexp²)``.

    Labels equal to ``IGNORE_INDEX`` count as zero; ``weights_T`` (floats, constants; default 1) count the others: 0 is as
    if ignored. Nothing is averaged: divide by the sum of the weights of the valid targets of the *global* batch. Sums,
    softmax and the weight's gradient are in fp32 (fp64 for fp64 inputs); the matrix products are in the inputs'
    precision. ``chunk_tokens`` bounds the live logits; by default it follows from V and the device. ``by_triton``: all
    between the products by kernels/triton_loss.py (not in fp64), which needs no logits in fp32 either.
    Differentiable once, in ``hidden_TD`` and ``weight_VD``. z-loss: PaLM, arXiv:2204.02311, section 5.
    """
    if chunk_tokens is None:
        # Logits of one chunk: many keep a GPU busy; on a CPU fewer stay in its cache.
        elements = 2**27 if hidden_TD.is_cuda else 2**22
        chunk_tokens = max(128, elements // weight_VD.shape[0])
    if not torch.is_grad_enabled():
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()  # or the gradients would be computed in vain
    objective, token, per_token = _FusedLinearCrossEntropy.apply(
        hidden_TD, weight_VD, labels_T, weights_T, z_loss_coef, chunk_tokens, by_triton
    )
    return LossSums(objective, token, per_token=per_token)


def _accumulate(total_VD: torch.Tensor, part_VD: torch.Tensor) -> None:
    """``total += part``. CPUs first copy all of a ``part`` of lower precision, into fresh memory: there, a few rows at a
    time, whose copies stay in the cache."""
    rows = len(part_VD) if part_VD.is_cuda or part_VD.dtype == total_VD.dtype else max(1, 2**17 // part_VD.shape[1])
    for total, part in zip(total_VD.split(rows), part_VD.split(rows), strict=True):
        total += part


def _cross_entropy_(
    logits_tV: torch.Tensor,
    label_t: torch.Tensor,
    counted_t: torch.Tensor,
    nll_t: torch.Tensor,
    z_loss_coef: float,
    *,
    ignore_index: int,
    gradient: bool,
) -> torch.Tensor:
    """The eager twin of ``kernels.triton_loss.cross_entropy_``, which says what it does, in fp32 or fp64."""
    valid_t = label_t != ignore_index
    index_t1 = torch.where(valid_t, label_t, 0).unsqueeze(1)
    label_z_t, max_t1 = logits_tV.gather(1, index_t1).squeeze(1), logits_tV.amax(1, keepdim=True)
    exp_tV = logits_tV.sub_(max_t1).exp_()  # in place and once: the gradient needs the same exponentials
    sum_t1 = exp_tV.sum(1, keepdim=True)
    lse_t = (max_t1 + sum_t1.log()).squeeze(1)
    torch.mul(lse_t - label_z_t, valid_t, out=nll_t)
    if gradient:
        # d objective / d z = weight * (p (1 + 2 z_coef lse) - onehot(label)), and zero for ignored labels
        scale_t = (1 + 2 * z_loss_coef * lse_t) * counted_t
        exp_tV.mul_(scale_t.unsqueeze(1) / sum_t1)
        exp_tV.scatter_add_(1, index_t1, -counted_t.unsqueeze(1))
    return lse_t


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        weights_T: torch.Tensor | None,
        z_loss_coef: float,
        chunk_tokens: int,
        by_triton: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (T, _), V = hidden_TD.shape, weight_VD.shape[0]
        compute = torch.promote_types(hidden_TD.dtype, torch.float32)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        by_triton = by_triton and compute == torch.float32
        kernel = importlib.import_module("tinytron.kernels.triton_loss") if by_triton else None
        cross_entropy_ = kernel.cross_entropy_ if kernel else _cross_entropy_
        grad_hidden = torch.empty_like(hidden_TD) if want_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=compute) if want_weight else None
        objective = hidden_TD.new_zeros((), dtype=compute)
        token = hidden_TD.new_zeros((), dtype=compute)
        per_token = hidden_TD.new_empty(T, dtype=compute)
        # The same buffers for all chunks: on a CPU, touching fresh memory costs more than the arithmetic on it.
        size = min(chunk_tokens, T)
        products = hidden_TD.new_empty(size, V)
        in_place = by_triton or compute == hidden_TD.dtype
        scores = products if in_place else hidden_TD.new_empty(size, V, dtype=compute)
        part_VD = torch.empty_like(weight_VD) if want_weight else None
        for start in range(0, T, chunk_tokens):
            h_tD, label_t = hidden_TD[start : start + chunk_tokens], labels_T[start : start + chunk_tokens]
            counted_t = (label_t != IGNORE_INDEX).to(compute)
            if weights_T is not None:
                counted_t = counted_t * weights_T[start : start + chunk_tokens].to(compute)
            product_tV = torch.mm(h_tD, weight_VD.t(), out=products[: len(h_tD)])
            z_tV = product_tV if in_place else scores[: len(h_tD)].copy_(product_tV)
            nll_t = per_token[start : start + chunk_tokens]
            lse_t = cross_entropy_(
                z_tV,
                label_t,
                counted_t,
                nll_t,
                z_loss_coef,
                ignore_index=IGNORE_INDEX,
                gradient=want_hidden or want_weight,
            )
            nll = (nll_t * counted_t).sum()
            token += nll
            objective += nll + z_loss_coef * (lse_t.square() * counted_t).sum()
            if not in_place and (want_hidden or want_weight):
                product_tV.copy_(z_tV)
            if grad_hidden is not None:
                torch.mm(product_tV, weight_VD, out=grad_hidden[start : start + chunk_tokens])
            if grad_weight is not None:
                _accumulate(grad_weight, torch.mm(product_tV.t(), h_tD, out=part_VD))
        ctx.grads = (grad_hidden, grad_weight)
        ctx.mark_non_differentiable(token, per_token)
        return objective, token, per_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_objective: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("the fused loss can be differentiated once only: call the model again")
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None  # scaled in place below
        if grad_hidden is not None:
            grad_hidden.mul_(grad_objective)
        if grad_weight is not None:
            grad_weight.mul_(grad_objective)
        return grad_hidden, grad_weight, None, None, None, None, None
