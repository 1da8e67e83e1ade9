"""Linear layers that say what they are for."""

from __future__ import annotations

import torch.nn as nn


class ResidualLinear(nn.Linear):
    """A projection whose output is added to the residual stream; its initial weights are scaled down with depth."""
