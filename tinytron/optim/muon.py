"""One optimizer that uses Muon (orthogonalized momentum; Jordan et al., 2024) for matrices and AdamW for everything else.

The polar factor comes from Polar Express (arXiv:2505.16932), the optional second moment from NorMuon (arXiv:2510.05491),
and the sign rule of the weight decay from Cautious Weight Decay (arXiv:2510.12402).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from tinytron.kernels.choice import DEFAULT, Kernels, TritonKernel
from tinytron.kernels.gram import fuses, gram, plus_square

# (a, b, c) of each iteration X <- aX + (bA + cA²)X, A = XXᵀ: Polar Express for 5 iterations with safety margin 2e-2.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrix: torch.Tensor, steps: int = 5, *, by: TritonKernel = "torch") -> torch.Tensor:
    """An approximation of the nearest matrix with singular values 1, for each matrix of ``[..., rows, cols]``, computed in
    the precision of ``matrix``.

    ``steps`` beyond 5 repeat the last coefficients. A zero matrix stays zero. ``by`` is the kernel for the symmetric
    products.
    """
    x = matrix / (torch.linalg.matrix_norm(matrix, keepdim=True) * 1.02 + 1e-6)
    wide = x.shape[-2] <= x.shape[-1]  # iterate on the smaller Gram matrix
    turned = not wide and fuses(by, x.dtype)  # the kernel only multiplies rows; torch needs no copy for either
    if turned:
        x = x.mT.contiguous()
    rows = wide or turned
    for step in range(steps):
        a, b, c = POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)]
        polynomial = plus_square(gram(x if rows else x.mT, by), b, c, by)
        x = a * x + (polynomial @ x if rows else x @ polynomial)
    return x.mT if turned else x


class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer. Groups with ``kind="muon"`` hold whole matrices ``[rows, cols]`` or stacks
    ``[experts, rows, cols]`` (each expert is orthogonalized separately); groups with ``kind="adamw"`` hold any parameters.

    Muon step: m <- momentum m + (1 - momentum) g; u = (1 - momentum) g + momentum m; u <- orthogonalize(u) for each of the
    matrix's ``row_blocks`` (packed projections), times sqrt(max(1, rows / cols)). With ``normuon``, u is divided by the
    root of its running mean square along the longer side and scaled back to its norm. With ``cautious``, decay applies
    only where it and the update agree in sign. A step with ``found_inf`` set to 1 changes nothing, and the host does
    not wait.

    A matrix whose gradient is all zeros, such as an expert without tokens, gets no update in that step. Otherwise its
    remaining momentum, once orthogonalized, would move it at full speed for hundreds of steps. Its momentum and its
    weights still decay.
    """

    _step_supports_amp_scaling = True  # reads self.found_inf, like torch's fused optimizers

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        ns_steps: int = 5,
        normuon: bool = False,
        normuon_beta2: float = 0.95,
        cautious: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        kernels: Kernels = DEFAULT,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "ns_steps": ns_steps,
            "normuon": normuon,
            "normuon_beta2": normuon_beta2,
            "cautious": cautious,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "kind": "adamw",
            "row_blocks": (),
        }
        super().__init__(groups, defaults)
        self.found_inf: torch.Tensor | None = None
        self.grad_scale: torch.Tensor | None = None
        self.by = kernels.gram

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "muon":
                for p in params:
                    self._muon(p, group)
            elif params:
                self._adamw(params, group)

    def _muon(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        grad, momentum, lr = p.grad, group["momentum"], group["lr"]
        assert grad is not None, "step passes only parameters with a gradient"
        new_momentum = torch.lerp(grad, state["momentum_buffer"], momentum)
        look_ahead = torch.lerp(grad, new_momentum, momentum)
        sizes = group["row_blocks"] or look_ahead.shape[-2]
        blocks = zip(look_ahead.split(sizes, dim=-2), grad.split(sizes, dim=-2), strict=True)
        update = torch.cat([self._direction(block, of_step, group) for block, of_step in blocks], dim=-2)
        if group["normuon"]:
            update = self._normalize(update, state, group)
        decay = group["weight_decay"] * p
        if group["cautious"]:
            decay = decay * (update * p >= 0)
        state["momentum_buffer"].copy_(self._unless_skipped(new_momentum, state["momentum_buffer"]))
        p.copy_(self._unless_skipped(p - lr * (update + decay), p))

    def _direction(self, block: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """The update of one matrix, or of each matrix of a stack; zero for a matrix whose ``grad`` is zero."""
        rows, cols = block.shape[-2:]
        moves = torch.linalg.vector_norm(grad, ord=math.inf, dim=(-2, -1), keepdim=True) != 0
        block = torch.where(moves, block, 0.0)
        return orthogonalize(block, group["ns_steps"], by=self.by) * max(1.0, rows / cols) ** 0.5

    def _normalize(self, update: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        dim = -1 if update.shape[-2] >= update.shape[-1] else -2
        mean_square = update.square().mean(dim, keepdim=True)
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros_like(mean_square)
        moment = torch.lerp(mean_square, state["second_moment"], group["normuon_beta2"])
        scaled = update * moment.clamp(min=1e-10).rsqrt()
        norms = [torch.linalg.matrix_norm(u, keepdim=True) for u in (update, scaled)]
        moment = torch.where(norms[0] != 0, moment, state["second_moment"])  # without an update, keep the old moment
        state["second_moment"].copy_(self._unless_skipped(moment, state["second_moment"]))
        return scaled * (norms[0] / norms[1].clamp(min=1e-30))

    def _unless_skipped(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new)

    def _adamw(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            found_inf=self.found_inf,
        )
