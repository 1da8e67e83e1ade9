"""One Muon step of one matrix from its definition: through the singular values, which the iteration maps one by one."""

from __future__ import annotations

import torch

# Polar Express, arXiv:2505.16932: 5 iterations, safety margin 2e-2.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """X <- aX + bXX'X + cXX'XX'X keeps singular vectors and maps each singular value s to as + bs^3 + cs^5."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / (matrix.square().sum().sqrt() * 1.02 + 1e-6)
    for a, b, c in COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    return left * values @ right


def direction(matrix: torch.Tensor, grad: torch.Tensor, blocks: tuple[int, ...]) -> torch.Tensor:
    """Each block of rows by itself, tall ones scaled up by the root of their aspect; none where there is no gradient."""
    out, first = [], 0
    for rows in blocks or (len(matrix),):
        block, cols = matrix[first : first + rows], matrix.shape[1]
        idle = not grad[first : first + rows].any()
        out.append(torch.zeros_like(block) if idle else polar(block) * max(1.0, rows / cols) ** 0.5)
        first += rows
    return torch.cat(out)


class Muon:
    """Nesterov momentum, direction, decoupled decay; for one matrix ``[rows, cols]`` or a stack of them."""

    def __init__(self, weight: torch.Tensor, blocks: tuple[int, ...], decay: float, normuon: bool) -> None:
        self.weight, self.blocks, self.decay, self.normuon = weight, blocks, decay, normuon
        self.momentum = torch.zeros_like(weight)
        self.second: list[torch.Tensor | float] = [0.0] * (len(weight) if weight.ndim == 3 else 1)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        grad = self.weight.grad
        assert grad is not None
        self.momentum = 0.95 * self.momentum + 0.05 * grad
        ahead = 0.05 * grad + 0.95 * self.momentum
        stacks = (ahead, grad) if ahead.ndim == 3 else (ahead.unsqueeze(0), grad.unsqueeze(0))
        pairs = enumerate(zip(*stacks, strict=True))
        update = torch.stack([self._scaled(i, direction(m, g, self.blocks)) for i, (m, g) in pairs])
        self.weight -= lr * (update.view_as(self.weight) + self.decay * self.weight)

    def _scaled(self, i: int, update: torch.Tensor) -> torch.Tensor:
        """NorMuon: over the root mean square along the longer side, averaged over steps; of the same norm."""
        if not self.normuon or not update.any():  # an expert that no token came to
            return update
        square = (update**2).mean(1 if len(update) >= update.shape[1] else 0, keepdim=True)
        moment = self.second[i] = 0.95 * self.second[i] + 0.05 * square
        scaled = update / moment.clamp(min=1e-10).sqrt()
        return scaled * ((update**2).sum() / (scaled**2).sum()).sqrt()
