"""The dense feed-forward layers. ``MoE`` may be imported from here, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from tinytron.hooks.points import HasPoints
from tinytron.kernels.choice import DEFAULT, Kernels
from tinytron.kernels.swiglu import swiglu
from tinytron.model.modules.linear import PackedLinear, ResidualLinear

if TYPE_CHECKING:
    from tinytron.model.modules.moe import MoE as MoE


class SwiGLU(HasPoints):
    """``down(silu(gate(x)) * up(x))`` (arXiv:2002.05202): ``[..., D] -> [..., D]``. Gate and up are packed
    into one matrix, ``[2F, D]``, gate first."""

    points = ("pre_proj",)

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, kernels: Kernels = DEFAULT) -> None:
        super().__init__()
        self.by = kernels.swiglu
        names = ("gate_proj", "up_proj")
        self.gate_up_proj = PackedLinear(hidden_size, (intermediate_size, intermediate_size), names, bias=bias)
        self.down_proj = ResidualLinear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.point("pre_proj", swiglu(self.gate_up_proj(x), self.by)))
        return out


class GELU(HasPoints):
    """``down(gelu(up(x)))`` (arXiv:1606.08415): ``[..., D] -> [..., D]``. The GELU is exact, or GPT-2's
    ``tanh`` approximation."""

    points = ("pre_proj",)

    def __init__(
        self, hidden_size: int, intermediate_size: int, bias: bool, approximate: Literal["none", "tanh"]
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = ResidualLinear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.point("pre_proj", F.gelu(self.up_proj(x), approximate=self.approximate))
        out: torch.Tensor = self.down_proj(inner)
        return out


def make_mlp(
    kind: Literal["swiglu", "gelu", "gelu_tanh"],
    hidden_size: int,
    intermediate_size: int,
    bias: bool,
    kernels: Kernels = DEFAULT,
) -> SwiGLU | GELU:
    """The feed-forward layer that ``--mlp_type`` names."""
    if kind == "swiglu":
        return SwiGLU(hidden_size, intermediate_size, bias, kernels)
    return GELU(hidden_size, intermediate_size, bias, "tanh" if kind == "gelu_tanh" else "none")


def __getattr__(name: str) -> Any:
    """``MoE``, imported on first use: its file needs ``SwiGLU`` from this one."""
    if name == "MoE":
        from tinytron.model.modules.moe import MoE

        return MoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
