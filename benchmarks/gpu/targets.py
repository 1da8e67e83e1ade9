"""What the figures should reach. One row a target; the table says met, missed and by how much, or not run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """``figure`` is to be at least, or at most, ``bound``; ``form`` prints it."""

    figure: str
    what: str
    bound: float
    at_most: bool = False
    form: str = ".2f"

    def met(self, value: float) -> bool:
        """Whether ``value`` is good enough; a NaN is not."""
        return value <= self.bound if self.at_most else value >= self.bound

    def missed_by(self, value: float) -> float:
        """How far ``value`` is from the bound, relative to the bound (to 1 where the bound is 0); 0 if it is met."""
        if self.met(value):
            return 0.0
        return abs(value - self.bound) / (abs(self.bound) or 1.0)


TRITON = ("loss_rows", "head_and_loss", "dispatch", "combine", "gram", "polynomial", "orthogonalize")

TARGETS = (
    Target("speed.dense128.mfu", "0.25B, heads of 128: MFU of the measured product rate", 0.55, form=".1%"),
    Target("speed.large.mfu", "1B: MFU of the measured product rate", 0.55, form=".1%"),
    Target("speed.dense128.over_transformers", "0.25B, heads of 128: speed over transformers, compiled", 1.2),
    Target("speed.dense64.over_transformers", "0.25B, heads of 64: speed over transformers, compiled", 1.2),
    Target("speed.large.over_transformers", "1B: speed over transformers, compiled", 1.2),
    Target("speed.experts.over_transformers", "experts: speed over transformers' grouped ones", 1.5),
    Target("memory.worst_error", "--dry_run: distance from measured memory", 0.05, at_most=True, form=".1%"),
    Target("costs.host_waits", "host waits in a dense training step", 0, at_most=True, form=".0f"),
    *(Target(f"kernels.{name}.gain", f"{name} by Triton over its best twin", 1.1) for name in TRITON),
)
