"""The model from its definition: one formula a line, attention with explicit scores, logits in full, every expert for
every token.

Shares nothing with tinytron but the names of the weights. Letters as in tinytron.model.modules.attn and moe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]
At = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Experts:
    """What the router's and experts' weights alone do not tell."""

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalized: bool = True
    first_k_dense: int = 0
    scope: Literal["sequence", "batch"] = "sequence"
    balance_coef: float = 0.0
    z_coef: float = 0.0
    bias_rate: float = 0.0


@dataclass(frozen=True)
class Shape:
    """The sizes that weights alone do not tell."""

    layers: int
    heads: int
    kv_heads: int
    theta: float = 10000.0
    eps: float = 1e-6
    experts: Experts | None = None


@dataclass
class Routed:
    """One expert layer's decisions, [B, S, E]: the router's logits, probabilities that sum to one, and 1 where chosen."""

    layer: int
    logits: torch.Tensor
    prob: torch.Tensor
    chosen: torch.Tensor


def logits(weights: Weights, ids_BS: torch.Tensor, shape: Shape) -> torch.Tensor:
    """``[B, S] -> [B, S, V]``."""
    return forward(weights, ids_BS, shape)[0]


def forward(
    weights: Weights, ids_BS: torch.Tensor, shape: Shape, at: At = lambda name, x: x
) -> tuple[torch.Tensor, list[Routed]]:
    """Logits ``[B, S, V]`` and what the routers of the expert layers did. ``at`` gets the name and the value of every
    point (docs/hooks.md), and returns the value to continue with."""
    x, routed = weights["wte.weight"][ids_BS], []
    for i in range(shape.layers):
        block = {k.removeprefix(f"blocks.{i}."): v for k, v in weights.items() if k.startswith(f"blocks.{i}.")}

        def here(name: str, x: torch.Tensor, prefix: str = f"blocks.{i}.") -> torch.Tensor:
            return at(prefix + name, x)

        x = here("input", x)
        x = here("post_attn", x + _attention(_norm(x, block["attn_norm.weight"], shape.eps), block, shape, here))
        normed = here("mlp.input", _norm(x, block["mlp_norm.weight"], shape.eps))
        if shape.experts is None or i < shape.experts.first_k_dense:
            inner = here("mlp.pre_proj", _gated(normed, block["mlp.gate_up_proj.weight"]))
            x = x + inner @ block["mlp.down_proj.weight"].T
        else:
            out, routing = _mixture(normed, block, shape.experts, i, here)
            x = x + out
            routed.append(routing)
        x = here("post_mlp", x)
    return _norm(x, weights["final_norm.weight"], shape.eps) @ weights["lm_head.weight"].T, routed


def mean_loss(weights: Weights, ids_BS: torch.Tensor, labels_BS: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Cross entropy averaged over all valid targets of the batch; zero if there are none."""
    total = F.cross_entropy(logits(weights, ids_BS, shape).flatten(0, 1), labels_BS.flatten(), reduction="sum")
    return total / (labels_BS != -100).sum().clamp(min=1)


def balance_sum(routings: Sequence[Routed], experts: Experts) -> torch.Tensor:
    """Tokens x E x sum_e f_e p_e: f_e the part of the choices that fell on e, p_e its mean probability; over each
    sequence and summed, or over all at once. One layer's ``routings`` are of sequences that may differ in length."""
    groups = [(prob, chosen) for r in routings for prob, chosen in zip(r.prob, r.chosen, strict=True)]
    if experts.scope == "batch":
        probs, choices = zip(*groups, strict=True)
        groups = [(torch.cat(probs), torch.cat(choices))]
    terms = [len(p) * p.shape[1] * (c.mean(0) / experts.top_k * p.mean(0)).sum() for p, c in groups]
    return torch.stack(terms).sum()


def z_sum(routings: Sequence[Routed]) -> torch.Tensor:
    """Sum over tokens of the squared log of the sum of exponentials."""
    return torch.stack([r.logits.exp().sum(-1).log().square().sum() for r in routings]).sum()


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _gated(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    h = x @ gate_up.T
    gate, up = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
    return gate * torch.sigmoid(gate) * up


def _mixture(x_BSD: torch.Tensor, block: Weights, experts: Experts, layer: int, at: At) -> tuple[torch.Tensor, Routed]:
    scores = x_BSD @ block["mlp.router.weight"].T
    positive = scores.exp() if experts.score == "softmax" else 1 / (1 + (-scores).exp())
    prob = positive / positive.sum(-1, keepdim=True)
    value = prob if experts.score == "softmax" else positive
    E = scores.shape[-1]
    ranking = (value.detach() + block["mlp.router.bias"]).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(prob)
    for choice in range(experts.top_k):
        chosen = chosen + F.one_hot(ranking[..., choice], E)
    weight = value * chosen
    if experts.renormalized:
        weight = weight / weight.sum(-1, keepdim=True)
    out = torch.zeros_like(x_BSD)
    for e in range(E):
        gate_up, down = block["mlp.experts.gate_up_proj"][e], block["mlp.experts.down_proj"][e]
        out = out + weight[..., e : e + 1] * (_gated(x_BSD, gate_up) @ down.T)
    if "mlp.shared.gate_up_proj.weight" in block:
        inner = at("mlp.shared.pre_proj", _gated(x_BSD, block["mlp.shared.gate_up_proj.weight"]))
        out = out + inner @ block["mlp.shared.down_proj.weight"].T
    return out, Routed(layer, scores, prob, chosen.detach())


def _attention(x_BSD: torch.Tensor, block: Weights, shape: Shape, at: At) -> torch.Tensor:
    (B, S, _), N, K = x_BSD.shape, shape.heads, shape.kv_heads
    x_BSD = at("attn.input", x_BSD)
    heads = (x_BSD @ block["attn.qkv_proj.weight"].T).view(B, S, N + 2 * K, -1)
    q, k, v = heads[:, :, :N], heads[:, :, N : N + K], heads[:, :, N + K :]
    q, k, v = at("attn.q", _turn(q, shape.theta)), at("attn.k", _turn(k, shape.theta)), at("attn.v", v)
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    out = []
    for n in range(N):
        shared = n // (N // K)  # the key/value head of this query head
        scores = q[:, :, n] @ k[:, :, shared].transpose(1, 2) / q.shape[-1] ** 0.5
        out.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, :, shared])
    return at("attn.pre_proj", torch.stack(out, dim=2)).flatten(2) @ block["attn.out_proj.weight"].T


def _turn(x_BSNH: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions as complex multiplication: element i and element i + H/2 are one complex number."""
    S, H = x_BSNH.shape[1], x_BSNH.shape[3]
    speed = theta ** (-torch.arange(0, H, 2, dtype=torch.float64) / H)
    angle = torch.arange(S, dtype=torch.float64)[:, None] * speed
    turn = torch.polar(torch.ones_like(angle), angle)[:, None].to(torch.promote_types(x_BSNH.dtype, torch.complex64))
    turned = torch.complex(x_BSNH[..., : H // 2], x_BSNH[..., H // 2 :]) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)
