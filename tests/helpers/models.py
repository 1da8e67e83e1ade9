"""Models to compare."""

from __future__ import annotations

import torch

from tinytron.model import GPT


@torch.no_grad()
def redrawn(model: GPT) -> GPT:
    """``model`` with large weights, and norms and biases off their neutral values, so that nothing hides."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
    return model
