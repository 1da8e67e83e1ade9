"""Output head and cross entropy in one operation that never holds all [tokens, vocabulary] logits.

The forward pass also computes the gradients, chunk by chunk, while a chunk's logits are in memory. So nothing
is computed twice, and only one chunk is alive (the idea of Cut Your Losses, arXiv:2411.09009, and Liger,
arXiv:2410.10989, in plain PyTorch). Letters: T tokens, t tokens of one chunk, D model dimension, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from tinytron.kernels.choice import LossKernel

Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # objective, token, per_token, hits


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    ignore_index: int,
    weights_T: torch.Tensor | None = None,
    z_loss_coef: float = 0.0,
    chunk_tokens: int | None = None,
    by: LossKernel = "torch",
    count_hits: bool = False,
) -> Losses:
    """The sum over tokens of ``weight * (-log softmax(hidden @ weight.T)[label] + z_loss_coef * lse²)``, where
    lse is the logsumexp of a token's logits (z-loss: PaLM, arXiv:2204.02311, section 5).

    Returns this objective, differentiable once in ``hidden_TD`` and ``weight_VD``; the same sum without z-loss,
    detached; every token's cross entropy ``[T]``, detached and not weighted; and with ``count_hits`` the number of labels
    with a weight above 0 that are the likeliest token (the first of equal ones), otherwise 0.

    Labels equal to ``ignore_index`` count as zero. ``weights_T`` (floats, constants; default 1) weigh the
    others; a weight of 0 is the same as an ignored label. Sums, softmax and the weight's gradient are in fp32
    (fp64 for fp64 inputs); the matrix products are in the inputs' precision. ``chunk_tokens`` bounds the live
    logits; the default depends on V and the device.

    With ``triton``, cross_entropy_triton.py computes everything between the products and needs no logits in
    fp32 (fp64 stays with torch). With ``cut``, the cut-cross-entropy package computes everything; it has no
    z-loss and no chunks. Raises: ValueError for a ``z_loss_coef`` with ``cut``.
    """
    if not torch.is_grad_enabled():  # otherwise the forward pass would compute gradients needlessly
        hidden_TD = hidden_TD.detach()
        weight_VD = weight_VD.detach()
    if chunk_tokens is None:
        # Number of logits in a chunk: a GPU needs many to stay busy; on a CPU a smaller chunk stays in the cache.
        elements = 2**27 if hidden_TD.is_cuda else 2**22
        chunk_tokens = max(128, elements // weight_VD.shape[0])
    if by == "cut":
        losses = _by_package(hidden_TD, weight_VD, labels_T, weights_T, z_loss_coef, ignore_index)
        hits = losses[3]
        for start in range(0, len(hidden_TD) if count_hits else 0, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            counted_t = _counted(labels_T[chunk], None if weights_T is None else weights_T[chunk], ignore_index)
            hits += _hits(hidden_TD[chunk].detach() @ weight_VD.detach().t(), labels_T[chunk], counted_t)
        return losses
    by_triton = by == "triton" and hidden_TD.dtype != torch.float64
    found: Losses = _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, labels_T, weights_T, z_loss_coef, chunk_tokens, ignore_index, by_triton, count_hits
    )
    return found


def cross_entropy_(
    logits_tV: torch.Tensor,
    label_t: torch.Tensor,
    counted_t: torch.Tensor,
    nll_t: torch.Tensor,
    z_loss_coef: float,
    *,
    ignore_index: int,
    gradient: bool,
) -> torch.Tensor:
    """The eager counterpart of ``cross_entropy_triton.cross_entropy_`` (described there), in fp32 or fp64."""
    valid_t = label_t != ignore_index
    index_t1 = torch.where(valid_t, label_t, 0).unsqueeze(1)
    label_z_t = logits_tV.gather(1, index_t1).squeeze(1)
    max_t1 = logits_tV.amax(1, keepdim=True)
    exp_tV = logits_tV.sub_(max_t1).exp_()  # computed once, in place: the gradient needs the same exponentials
    sum_t1 = exp_tV.sum(1, keepdim=True)
    lse_t = (max_t1 + sum_t1.log()).squeeze(1)
    torch.mul(lse_t - label_z_t, valid_t, out=nll_t)
    if gradient:
        # d objective / d z = weight * (p (1 + 2 z_coef lse) - onehot(label)); zero for ignored labels
        scale_t = (1 + 2 * z_loss_coef * lse_t) * counted_t
        exp_tV.mul_(scale_t.unsqueeze(1) / sum_t1)
        exp_tV.scatter_add_(1, index_t1, -counted_t.unsqueeze(1))
    return lse_t


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        weights_T: torch.Tensor | None,
        z_loss_coef: float,
        chunk_tokens: int,
        ignore_index: int,
        by_triton: bool,
        count_hits: bool,
    ) -> Losses:
        T = len(hidden_TD)
        grads = ChunkGradients(hidden_TD, weight_VD, ctx.needs_input_grad)
        logits = ChunkLogits(hidden_TD, weight_VD, min(chunk_tokens, T), by_triton)
        rows_ = _rows_kernel(by_triton)
        objective = hidden_TD.new_zeros((), dtype=logits.dtype)
        token = hidden_TD.new_zeros((), dtype=logits.dtype)
        per_token = hidden_TD.new_empty(T, dtype=logits.dtype)
        hits = torch.zeros_like(token, dtype=torch.int64)
        for start in range(0, T, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            weights_t = None if weights_T is None else weights_T[chunk].to(logits.dtype)
            counted_t = _counted(labels_T[chunk], weights_t, ignore_index).to(logits.dtype)
            nll_t = per_token[chunk]
            z_tV = logits.of(hidden_TD[chunk], weight_VD)
            if count_hits:
                hits += _hits(z_tV, labels_T[chunk], counted_t)
            lse_t = rows_(
                z_tV, labels_T[chunk], counted_t, nll_t, z_loss_coef, ignore_index=ignore_index, gradient=grads.wanted
            )
            nll = (nll_t * counted_t).sum()
            token += nll
            objective += nll + z_loss_coef * (lse_t.square() * counted_t).sum()
            if grads.wanted:
                grads.add(logits.rounded(z_tV), hidden_TD, weight_VD, chunk)
        ctx.grads = (grads.hidden_TD, grads.weight_VD)
        ctx.mark_non_differentiable(token, per_token, hits)
        return objective, token, per_token, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_objective: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("the fused loss can be differentiated only once: call the model again")
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None  # they are scaled in place below, so they cannot be used again
        if grad_hidden is not None:
            grad_hidden.mul_(grad_objective)
        if grad_weight is not None:
            grad_weight.mul_(grad_objective)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


def _counted(label_t: torch.Tensor, weight_t: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """How much each label counts: its weight (default: 1, as a bool), or 0 if it is ignored."""
    valid_t = label_t != ignore_index
    return valid_t if weight_t is None else valid_t * weight_t


def _hits(logits_tV: torch.Tensor, label_t: torch.Tensor, counted_t: torch.Tensor) -> torch.Tensor:
    """The number of labels that count and have the largest logit, int64 scalar."""
    return ((logits_tV.argmax(1) == label_t) & (counted_t > 0)).sum()


class ChunkLogits:
    """The logits of one chunk at a time, in buffers that all chunks share, because on a CPU touching fresh
    memory takes longer than the arithmetic on it. ``dtype`` is the precision of softmax and sums."""

    def __init__(self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, size: int, by_triton: bool) -> None:
        V = len(weight_VD)
        self.dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        self._product = hidden_TD.new_empty(size, V)
        # The Triton kernel reads and writes logits in the inputs' precision.
        in_place = by_triton or self.dtype == hidden_TD.dtype
        self._wide = None if in_place else hidden_TD.new_empty(size, V, dtype=self.dtype)

    def of(self, h_tD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """The logits ``[t, V]``, valid until the next call; the caller may overwrite them."""
        product_tV = torch.mm(h_tD, weight_VD.t(), out=self._product[: len(h_tD)])
        return product_tV if self._wide is None else self._wide[: len(h_tD)].copy_(product_tV)

    def rounded(self, grad_tV: torch.Tensor) -> torch.Tensor:
        """The gradient that has overwritten the logits, in the inputs' precision."""
        return grad_tV if self._wide is None else self._product[: len(grad_tV)].copy_(grad_tV)


class ChunkGradients:
    """The gradients of both inputs, filled chunk by chunk; ``None`` for an input that needs no gradient."""

    def __init__(self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, needed: tuple[bool, ...]) -> None:
        want_hidden, want_weight = needed[:2]
        self.wanted = want_hidden or want_weight
        compute = torch.promote_types(hidden_TD.dtype, torch.float32)
        self.hidden_TD = torch.empty_like(hidden_TD) if want_hidden else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=compute) if want_weight else None
        self._part_VD = torch.empty_like(weight_VD) if want_weight else None

    def add(self, grad_tV: torch.Tensor, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, chunk: slice) -> None:
        """Add the contribution of a chunk, given the gradient of its logits."""
        if self.hidden_TD is not None:
            torch.mm(grad_tV, weight_VD, out=self.hidden_TD[chunk])
        if self.weight_VD is not None:
            _accumulate(self.weight_VD, torch.mm(grad_tV.t(), hidden_TD[chunk], out=self._part_VD))


def _accumulate(total_VD: torch.Tensor, part_VD: torch.Tensor) -> None:
    """``total += part``. If ``part`` has a lower precision, torch first copies all of it to fresh memory on
    CPUs. So it is added there a few rows at a time, whose copies stay in the cache."""
    at_once = part_VD.is_cuda or part_VD.dtype == total_VD.dtype
    rows = len(part_VD) if at_once else max(1, 2**17 // part_VD.shape[1])
    for total, part in zip(total_VD.split(rows), part_VD.split(rows), strict=True):
        total += part


def _rows_kernel(by_triton: bool) -> Callable[..., torch.Tensor]:
    """The function that turns a chunk's logits into losses and gradients."""
    if not by_triton:
        return cross_entropy_
    from tinytron.kernels import cross_entropy_triton  # needs the triton package

    return cross_entropy_triton.cross_entropy_


def _by_package(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    weights_T: torch.Tensor | None,
    z_loss_coef: float,
    ignore_index: int,
) -> Losses:
    """``linear_cross_entropy`` without z-loss, in bf16 or fp16, with the kernels of cut-cross-entropy
    (arXiv:2411.09009). It holds no logits in memory, not even those of a chunk.

    The package drops gradients below the inputs' precision (its ``filter_eps``), and sums the weight's
    gradient in that precision and in no fixed order. It counts the valid labels, for which the host waits.
    """
    if z_loss_coef:  # the package does not return the logsumexp
        raise ValueError(f'z_loss_coef {z_loss_coef} does not work with by="cut"; use 0')
    package = importlib.import_module("cut_cross_entropy")
    # No reduction, because the losses must be weighted and are also returned per token.
    nll_T = package.linear_cross_entropy(hidden_TD, weight_VD, labels_T, ignore_index=ignore_index, reduction="none")
    nll_T = nll_T.to(torch.promote_types(nll_T.dtype, torch.float32))
    objective = (nll_T if weights_T is None else nll_T * weights_T.to(nll_T.dtype)).sum()
    return objective, objective.detach(), nll_T.detach(), torch.zeros_like(objective, dtype=torch.int64)
