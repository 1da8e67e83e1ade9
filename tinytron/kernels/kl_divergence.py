"""KL(p || q) of two models' predictions over the whole vocabulary, from their hidden states and heads.

As in cross_entropy.py, the forward pass also computes the gradients, chunk by chunk: the logits of both models are in
memory for one chunk of tokens only. Letters: T tokens, t tokens of one chunk, D model dimension, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from tinytron.kernels.cross_entropy import ChunkGradients, ChunkLogits


def linear_kl_divergence(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    other_hidden_TD: torch.Tensor,
    other_weight_VD: torch.Tensor,
    counted_T: torch.Tensor,
    *,
    of_other: bool = False,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """The sum over tokens of ``counted * sum_v p_v (log p_v - log q_v)``, where p is the softmax of ``hidden @ weight.T``
    and q that of the ``other`` model, which is constant; with ``of_other`` KL(q || p) instead. Logits are divided by the
    ``temperature``.

    Differentiable once in ``hidden_TD`` and ``weight_VD``. Softmax and sums are in fp32 (fp64 for fp64 inputs), the matrix
    products in the inputs' precision. ``counted_T`` are constants. ``chunk_tokens`` bounds the live logits.
    """
    if not torch.is_grad_enabled():
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    if chunk_tokens is None:
        elements = 2**26 if hidden_TD.is_cuda else 2**21  # half of what the loss takes, because there are two models
        chunk_tokens = max(128, elements // weight_VD.shape[0])
    found: torch.Tensor = _LinearKL.apply(
        hidden_TD,
        weight_VD,
        other_hidden_TD.detach(),
        other_weight_VD.detach(),
        counted_T,
        of_other,
        temperature,
        chunk_tokens,
    )
    return found


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        other_hidden_TD: torch.Tensor,
        other_weight_VD: torch.Tensor,
        counted_T: torch.Tensor,
        of_other: bool,
        temperature: float,
        chunk_tokens: int,
    ) -> torch.Tensor:
        T = len(hidden_TD)
        grads = ChunkGradients(hidden_TD, weight_VD, ctx.needs_input_grad)
        ours, theirs = (
            ChunkLogits(hidden, weight, min(chunk_tokens, T), False)
            for hidden, weight in ((hidden_TD, weight_VD), (other_hidden_TD, other_weight_VD))
        )
        total = hidden_TD.new_zeros((), dtype=ours.dtype)
        for start in range(0, T, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            log_p_tV = _log_softmax_(ours.of(hidden_TD[chunk], weight_VD), temperature)
            log_q_tV = _log_softmax_(theirs.of(other_hidden_TD[chunk], other_weight_VD), temperature)
            counted_t1 = counted_T[chunk, None].to(ours.dtype)
            kl_t1, grad_tV = (_kl_of_other_ if of_other else _kl_)(log_p_tV, log_q_tV.to(ours.dtype))
            total += (kl_t1 * counted_t1).sum()
            if grads.wanted:
                grads.add(ours.rounded(grad_tV.mul_(counted_t1 / temperature)), hidden_TD, weight_VD, chunk)
        ctx.grads = (grads.hidden_TD, grads.weight_VD)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("the divergence can be differentiated only once: call the model again")
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None  # they are scaled in place below, so they cannot be used again
        for grad in (grad_hidden, grad_weight):
            if grad is not None:
                grad.mul_(grad_total)
        return grad_hidden, grad_weight, *(None,) * 6


def _log_softmax_(logits_tV: torch.Tensor, temperature: float) -> torch.Tensor:
    """The logarithm of the softmax, in the place of the logits."""
    if temperature != 1:
        logits_tV /= temperature
    logits_tV -= logits_tV.logsumexp(1, keepdim=True)
    return logits_tV


def _kl_(log_p_tV: torch.Tensor, log_q_tV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) of every token, ``[t, 1]``, and its derivative by the logits of p, p (log p - log q - KL), in the place of
    ``log_p_tV``; ``log_q_tV`` is overwritten, too."""
    ratio_tV = torch.sub(log_p_tV, log_q_tV, out=log_q_tV)
    p_tV = log_p_tV.exp_()
    kl_t1 = (p_tV * ratio_tV).sum(1, keepdim=True)
    return kl_t1, p_tV.mul_(ratio_tV.sub_(kl_t1))


def _kl_of_other_(log_p_tV: torch.Tensor, log_q_tV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || p) of every token, and its derivative by the logits of p, p - q; in place like ``_kl_``."""
    q_tV = log_q_tV.exp()
    kl_t1 = (q_tV * log_q_tV.sub_(log_p_tV)).sum(1, keepdim=True)
    return kl_t1, log_p_tV.exp_().sub_(q_tV)
