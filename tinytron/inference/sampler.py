"""From logits to the next token: pure functions on ``[B, V]``. Excluded tokens get the logit -inf.

Applied in this order: temperature, top-k, top-p, min-p, draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tinytron.errors import ConfigError

_NEVER = float("-inf")
_ROUNDING = 1e-6  # tolerance for sums of probabilities from fp32 logits


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to continue a prompt. ``temperature`` 0 takes the likeliest token; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0
    exclude nothing. Raises: ConfigError for invalid values."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    num_samples: int = 1
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("top_k", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least {least}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature} must be at least 0 (the likeliest token); use 0.8")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p {self.top_p} must be above 0 and at most 1 (all tokens); use 0.9")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"--min_p {self.min_p} must be in [0, 1]; use 0.05")
        if "" in self.stop:
            raise ConfigError("--stop '' would stop at once; give a text of at least one character")


def keep_top_k(logits_BV: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the ``k`` largest logits of every row, and any equal to the smallest of them."""
    least_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, _NEVER)


def keep_top_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens with a total probability of at least ``p``, and at least one (nucleus
    sampling, arXiv:1904.09751, section 3.1). The first of equally likely tokens comes first."""
    sorted_BV, index_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    total_BV = sorted_BV.double().softmax(-1).cumsum(-1)
    before_BV = torch.nn.functional.pad(total_BV[:, :-1], (1, 0))
    # Rounding must not keep one token too many where ``p`` is reached exactly. The first is never excluded: 0 < p.
    excluded_BV = before_BV >= p * (1 - _ROUNDING)
    return logits_BV.masked_fill(torch.empty_like(excluded_BV).scatter_(-1, index_BV, excluded_BV), _NEVER)


def keep_min_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the tokens at least ``p`` times as likely as the likeliest (arXiv:2407.01082, section 3)."""
    prob_BV = logits_BV.softmax(-1)
    return logits_BV.masked_fill(prob_BV < p * prob_BV.amax(-1, keepdim=True), _NEVER)


def draw(logits_BV: torch.Tensor, u_B: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative distribution of softmax(logits) exceeds ``u_B`` (uniform in [0, 1), float64): the
    draw of a row depends only on its logits and its random number. Shapes: ``[B, V], [B] -> [B]``."""
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # Stay below the total, which rounding could reach: only excluded tokens come after it.
    target_B1 = torch.minimum(u_B.unsqueeze(1) * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)


def next_tokens(logits_BV: torch.Tensor, options: SamplingOptions, u_B: torch.Tensor) -> torch.Tensor:
    """The next token of every row, chosen by ``options`` with the uniform numbers ``u_B``: ``[B, V], [B] -> [B]``."""
    if options.temperature == 0:
        return logits_BV.argmax(-1)
    # Shift the largest logit to 0 before dividing, in fp64, so that no temperature above 0 overflows.
    logits_BV = logits_BV.double()
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / options.temperature
    if options.top_k:
        logits_BV = keep_top_k(logits_BV, options.top_k)
    if options.top_p < 1:
        logits_BV = keep_top_p(logits_BV, options.top_p)
    if options.min_p:
        logits_BV = keep_min_p(logits_BV, options.min_p)
    return draw(logits_BV, u_B)
