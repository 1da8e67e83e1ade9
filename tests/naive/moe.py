"""A mixture of experts from its definition: one token, one choice, one expert at a time.

Shares nothing with tinytron but the names of the weights and the packing of gate and up (gate first).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

Weights = dict[str, torch.Tensor]


@dataclass
class Rules:
    """How a token's experts are chosen and weighted."""

    top_k: int
    score: str = "softmax"
    norm_topk: bool = True
    bias: list[float] = field(default_factory=list)  # added to the scores for the choice only


@dataclass
class Routed:
    """One token's decision: experts, their weights, every expert's probability, and log-sum-exp of the logits."""

    experts: list[int]
    weights: list[torch.Tensor]
    probs: torch.Tensor
    log_partition: torch.Tensor


def route(token: torch.Tensor, router: torch.Tensor, rules: Rules) -> Routed:
    logits = torch.stack([(row * token).sum() for row in router])
    scores = [1 / (1 + (-z).exp()) for z in logits]
    if rules.score == "softmax":
        total = sum(z.exp() for z in logits)
        scores = [z.exp() / total for z in logits]
    bias = rules.bias or [0.0] * len(scores)
    ranked = sorted(range(len(scores)), key=lambda e: float(scores[e].detach()) + bias[e], reverse=True)
    chosen = ranked[: rules.top_k]
    weights = [scores[e] for e in chosen]
    if rules.norm_topk:
        weights = [w / sum(scores[e] for e in chosen) for w in weights]
    probs = torch.stack([s / sum(scores) for s in scores])
    return Routed(chosen, weights, probs, logits.exp().sum().log())


def feed_forward(token: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    width = len(gate_up) // 2
    gate, up = gate_up[:width] @ token, gate_up[width:] @ token
    return down @ (gate / (1 + (-gate).exp()) * up)


def moe(tokens_TD: torch.Tensor, weights: Weights, rules: Rules) -> tuple[torch.Tensor, list[Routed]]:
    """``[T, D] -> [T, D]`` and each token's decision. ``weights`` by the names inside the layer."""
    outs, decisions = [], []
    for token in tokens_TD:
        decision = route(token, weights["router.weight"], rules)
        out = torch.zeros_like(token)
        for expert, weight in zip(decision.experts, decision.weights, strict=True):
            packed, down = weights["experts.gate_up_proj"][expert], weights["experts.down_proj"][expert]
            out = out + weight * feed_forward(token, packed, down)
        if "shared.gate_up_proj.weight" in weights:
            out = out + feed_forward(token, weights["shared.gate_up_proj.weight"], weights["shared.down_proj.weight"])
        outs.append(out)
        decisions.append(decision)
    return torch.stack(outs), decisions


def load(decisions: list[Routed], num_experts: int) -> list[int]:
    """How many choices fell on each expert."""
    return [sum(d.experts.count(e) for d in decisions) for e in range(num_experts)]


def balance(groups: list[list[Routed]], num_experts: int) -> torch.Tensor:
    """Switch Transformer's loss, ``E * sum_e f_e P_e``, of each group of tokens, times its number of tokens: f is the
    share of choices that fell on e, P the mean probability of e."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        loads = load(group, num_experts)
        shares = [count / sum(loads) for count in loads]
        means = [sum(d.probs[e] for d in group) / len(group) for e in range(num_experts)]
        total = total + len(group) * num_experts * sum(f * p for f, p in zip(shares, means, strict=True))
    return total
