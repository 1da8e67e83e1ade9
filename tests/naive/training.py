"""The one-process twin of a training run: plain backward on the whole global batch, plain optimizers, no buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tests.naive.gpt import Shape, Weights, balance_sum, forward, z_sum
from tests.naive.muon import Muon

Arrays = dict[str, npt.NDArray[np.float64]]
# input_ids and labels of a whole global batch, and perhaps how many tokens of each row are not padding
Batches = Sequence[tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Recipe:
    """What a run optimizes with. ``micro_batches`` are consecutive parts of the global batch; they matter to the balance
    loss of scope ``batch`` only. ``layer_decay`` multiplies the rate once per block below the head. ``last_decay`` is the
    weight decay of the last step, to which it falls in a line. ``ema_decay``: weights are averaged, as torch does it."""

    optimizer: Literal["adamw", "sgd", "muon", "normuon"] = "adamw"
    max_lr: float = 2e-3
    min_lr: float = 2e-4
    warmup: int = 2
    weight_decay: float = 0.1
    last_decay: float | None = None
    layer_decay: float = 1.0
    ema_decay: float = 0.0
    clip: float = 0.0
    micro_batches: int = 1


@dataclass
class Outcome:
    """What a run produced, as float64 arrays by parameter name: per step, and in the end."""

    losses: list[float] = field(default_factory=list)
    aux: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: list[Arrays] = field(default_factory=list)  # after clipping
    load: list[Any] = field(default_factory=list)  # per step: choices by expert layer and expert
    biases: list[Any] = field(default_factory=list)  # per step: [expert layers, experts]
    weights: Arrays = field(default_factory=dict)
    averages: Arrays = field(default_factory=dict)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine wave that reaches ``min_lr`` at the last step. ``step`` counts from 0."""
    if step < recipe.warmup:
        return recipe.max_lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, steps - 1 - recipe.warmup)
    return recipe.min_lr + (recipe.max_lr - recipe.min_lr) * (1 + math.cos(math.pi * done)) / 2


def weight_decay(recipe: Recipe, step: int, steps: int) -> float:
    """Constant, or a line from ``weight_decay`` to ``last_decay``."""
    last = recipe.weight_decay if recipe.last_decay is None else recipe.last_decay
    return recipe.weight_decay + (last - recipe.weight_decay) * step / (steps - 1)


def layer_scale(name: str, layers: int, recipe: Recipe) -> float:
    """Learning-rate factor of the embedding, a block, or what follows the blocks."""
    if name.startswith("blocks."):
        return recipe.layer_decay ** (layers - int(name.split(".")[1]))
    return recipe.layer_decay ** (layers + 1) if name.startswith("w") else 1.0


class _Optimizers:
    """Plain ones, with a rate for each tensor."""

    def __init__(self, weights: Weights, shape: Shape, recipe: Recipe) -> None:
        muon = {n: w for n, w in weights.items() if "muon" in recipe.optimizer and "_proj" in n}
        head = next((w.shape[1] // shape.heads for n, w in weights.items() if n.endswith("out_proj.weight")), 0)

        def blocks(name: str, weight: torch.Tensor) -> tuple[int, ...]:
            if "qkv_proj" in name:
                return (shape.heads * head, shape.kv_heads * head, shape.kv_heads * head)
            return (weight.shape[-2] // 2,) * 2 if "gate_up_proj" in name else ()

        normuon = recipe.optimizer == "normuon"
        self.matrices = [Muon(w, blocks(n, w), recipe.weight_decay, normuon) for n, w in muon.items()]
        self.scales = [layer_scale(n, shape.layers, recipe) for n in muon]
        rest = {n: w for n, w in weights.items() if n not in muon}
        groups = [
            {"params": [w], "decays": w.ndim >= 2, "scale": layer_scale(n, shape.layers, recipe)}
            for n, w in rest.items()
        ]
        self.rest: torch.optim.Optimizer
        if recipe.optimizer == "sgd":
            self.rest = torch.optim.SGD(groups, lr=recipe.max_lr, momentum=0.9, foreach=False)
        else:
            self.rest = torch.optim.AdamW(groups, lr=recipe.max_lr, betas=(0.9, 0.95), eps=1e-8, foreach=False)

    def step(self, lr: float, decay: float) -> None:
        for group in self.rest.param_groups:
            group["lr"] = lr * group["scale"]
            group["weight_decay"] = decay if group["decays"] else 0.0
        self.rest.step()
        for matrix, scale in zip(self.matrices, self.scales, strict=True):
            matrix.decay = decay
            matrix.step(lr * scale)


def train(initial: Weights, batches: Batches, shape: Shape, recipe: Recipe) -> Outcome:
    """Train on ``batches``, one optimizer step each. Entries of ``initial`` that are one tensor stay one (tied)."""
    own: dict[int, torch.Tensor] = {}
    biases = {n: w.detach().clone() for n, w in initial.items() if n.endswith("router.bias")}
    given = {n: w for n, w in initial.items() if n not in biases}
    weights = {n: own.setdefault(w.data_ptr(), w.detach().clone().requires_grad_()) for n, w in given.items()}
    names = {id(w): n for n, w in reversed(weights.items())}  # of tied ones the first name
    parameters = {names[id(w)]: w for w in own.values()}
    optimizers, outcome = _Optimizers(parameters, shape, recipe), Outcome()
    averages: list[torch.Tensor] = []
    for step, batch in enumerate(batches):
        load = _backward({**weights, **biases}, batch, shape, recipe, outcome)
        limit = recipe.clip if recipe.clip > 0 else math.inf
        outcome.norms.append(float(torch.nn.utils.clip_grad_norm_(own.values(), limit, foreach=False)))
        outcome.grads.append({n: w.grad.double().numpy().copy() for n, w in parameters.items() if w.grad is not None})
        optimizers.step(learning_rate(recipe, step, len(batches)), weight_decay(recipe, step, len(batches)))
        current = [w.detach().clone() for w in own.values()]
        averages = averages or current
        get_ema_multi_avg_fn(recipe.ema_decay)(averages, current, step)
        for w in own.values():
            w.grad = None
        for i, bias in enumerate(biases.values()):
            assert shape.experts is not None
            for e in range(len(bias)):  # against the load, once per step
                bias[e] -= shape.experts.bias_rate * float(np.sign(load[i][e] - load[i].mean()))
        outcome.load.append(load)
        outcome.biases.append(np.array([bias.double().numpy() for bias in biases.values()]))
    outcome.averages = {names[i]: a.double().numpy() for i, a in zip(map(id, own.values()), averages, strict=True)}
    outcome.weights = {n: w.detach().double().numpy() for n, w in parameters.items()}
    return outcome


def _cut(ids: torch.Tensor, labels: torch.Tensor, *lengths: torch.Tensor) -> Batches:
    """The batch as it is, or each row by itself without its padding."""
    if not lengths:
        return [(ids, labels)]
    return [(ids[b : b + 1, :n], labels[b : b + 1, :n]) for b, n in enumerate(lengths[0].tolist())]


def _backward(weights: Weights, batch: tuple[torch.Tensor, ...], shape: Shape, recipe: Recipe, outcome: Outcome) -> Any:
    """Gradients of the global batch; returns how often each expert of each layer was chosen. The loss is a mean over
    targets, the routers' losses are means over tokens."""
    targets = (batch[1] != -100).sum().clamp(min=1)
    tokens = sum(ids.numel() for ids, _ in _cut(*batch))
    token, load = torch.zeros((), dtype=torch.float64), 0.0
    aux = {"moe_balance": 0.0, "moe_z": 0.0} if shape.experts else {}
    for part in zip(*(whole.chunk(recipe.micro_batches) for whole in batch), strict=True):
        rows = _cut(*part)
        outs = [forward(weights, ids, shape) for ids, _ in rows]
        pairs = [(out[0].flatten(0, 1), labels.flatten()) for out, (_, labels) in zip(outs, rows, strict=True)]
        loss = torch.stack([F.cross_entropy(*pair, reduction="sum") for pair in pairs]).sum() / targets
        token += loss.detach()
        layers = list(zip(*(routed for _, routed in outs), strict=True))
        for routings in layers:
            assert shape.experts is not None
            balance, z = balance_sum(routings, shape.experts) / tokens, z_sum(routings) / tokens
            loss = loss + shape.experts.balance_coef * balance + shape.experts.z_coef * z
            aux["moe_balance"] += float(balance.detach())
            aux["moe_z"] += float(z.detach())
        loss.backward()
        load = load + np.array([sum(r.chosen.sum((0, 1)).double().numpy() for r in routings) for routings in layers])
    outcome.losses.append(float(token) if (batch[1] != -100).any() else math.nan)  # no mean of nothing
    outcome.aux.append(aux)
    return load
