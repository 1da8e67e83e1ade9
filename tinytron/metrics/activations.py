"""Statistics of activations and of their gradients, at named points of the model (``tinytron.hooks``)."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.hooks import attached, selected
from tinytron.hooks.points import is_recomputing
from tinytron.metrics.step_statistics import Measuring

# The input of a later block is the post_mlp of the one before it.
LOGGED = ("blocks.0.input", "blocks.*.post_attn", "blocks.*.post_mlp", "blocks.*.pre_proj")
_CHUNK = 2**20  # elements that are in fp64 at a time


class ActivationStatistics:
    """Measures the activations of a step's training passes at the points ``LOGGED``, over all micro-batches and ranks.

    All tokens count, padding too. Sums are in fp64, a chunk at a time. ``loss_scale`` is the factor of the gradients.
    Compiled blocks run uncompiled in the steps that are measured. Raises: ConfigError for a model without points.
    """

    def __init__(self, model: nn.Module, state: ParallelState, loss_scale: torch.Tensor) -> None:
        self._model, self._state, self._loss_scale = model, state, loss_scale
        known = selected(model, ["*"], "--log_activations")
        self._names = [name for name in known if name in set(selected(model, LOGGED, "--log_activations"))]
        self._measuring = Measuring()

    def begin(self) -> None:
        """Measure the next step."""
        P, device = len(self._names), self._state.device
        # By point: powers 1 to 4 of the elements, zeros, elements, norms of tokens, tokens, squares of gradients.
        self._sums = torch.zeros(P, 9, dtype=torch.float64, device=device)
        self._extremes = torch.full((P, 2), -torch.inf, dtype=torch.float64, device=device)  # -x and x
        self._scale = self._loss_scale.clone().double()  # as it is in the step, which may change it at its end
        taps = {name: partial(self._measure, i) for i, name in enumerate(self._names)}
        self._measuring.start().enter_context(attached(self._model, taps))

    def record(self, step: int) -> dict[str, float]:
        """``activations/<point>/<statistic>`` and ``intermediate_grad_norms/<point>``. Collective; the host waits."""
        if not self._measuring.stop():
            return {}
        world = self._state.groups["world"]
        sums = sum_over(self._sums, world)
        sums[:, 8] /= self._scale.square()
        dist.all_reduce(self._extremes, op=dist.ReduceOp.MAX, group=world)
        found: dict[str, float] = {}
        gradients: dict[str, float] = {}
        rows = torch.cat((self._extremes, sums), 1).tolist()
        for name, (lowest, highest, *powers, zeros, elements, norms, tokens, squares) in zip(
            self._names, rows, strict=True
        ):
            if not tokens:  # a custom loss that never calls this model
                continue
            values = {
                "norm": norms / tokens,
                "min": -lowest,
                "max": highest,
                "zeros": zeros / elements,
                "kurtosis": kurtosis([power / elements for power in powers]),
            }
            found |= {f"activations/{name}/{statistic}": value for statistic, value in values.items()}
            gradients[f"intermediate_grad_norms/{name}"] = squares**0.5
        return found | gradients

    def _measure(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """A function at the i-th point. Passes without gradients are not training, and recomputed ones were seen before."""
        if torch.is_grad_enabled() and not is_recomputing():
            self._add(i, x.detach())
            if x.requires_grad:
                x.register_hook(partial(self._add_gradient, i))
        return x

    @torch.no_grad()
    def _add(self, i: int, x: torch.Tensor) -> None:
        x_TF = x.flatten(0, 1).flatten(1)
        for part_TF in x_TF.split(max(1, _CHUNK // x_TF.shape[1])):
            wide, zeros = part_TF.double(), (part_TF == 0).sum()
            square = wide.square()
            norms = square.sum(1).sqrt().sum()
            powers = (wide.sum(), square.sum(), (square * wide).sum(), square.square().sum())
            self._sums[i, :5] += torch.stack((*powers, zeros.double()))
            self._sums[i, 6] += norms
            low, high = torch.aminmax(wide)
            self._extremes[i] = torch.maximum(self._extremes[i], torch.stack((-low, high)))
        self._sums[i, 5] += x_TF.numel()
        self._sums[i, 7] += len(x_TF)

    def _add_gradient(self, i: int, grad: torch.Tensor) -> None:
        wide = torch.promote_types(
            grad.dtype, torch.float32
        )  # a norm in fp16 overflows, as gradients have the loss scale
        self._sums[i, 8] += torch.linalg.vector_norm(grad, dtype=wide).double().square()


def kurtosis(moments: list[float]) -> float:
    """The fourth central moment over the squared variance (3 for a normal distribution), from the means of the powers 1
    to 4; NaN for a constant."""
    m1, m2, m3, m4 = moments
    variance = m2 - m1**2
    central = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return central / variance**2 if variance > 1e-14 * m2 else float("nan")
