"""The parts in the order in which they run: those that tell most per second first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """``python -m gpu.<module> <arguments>``. ``expected`` seconds are for an H100; it is stopped after three times that
    and half a minute. ``alone``: it measures time, so nothing else runs meanwhile."""

    name: str
    proves: str
    module: str
    arguments: tuple[str, ...]
    expected: int
    alone: bool = False

    @property
    def limit(self) -> float:
        """Seconds after which it is stopped."""
        return 3.0 * self.expected + 30.0


def _tests(name: str, proves: str, expected: int) -> Part:
    return Part(f"tests-{name}", proves, "gpu.tests", ("--file", name), expected)


def _speed(role: str, proves: str, expected: int) -> Part:
    return Part(f"speed-{role}", proves, "gpu.speed", ("--role", role), expected, alone=True)


PARTS = (
    Part("environment", "versions, free memory, measured ceilings", "gpu.environment", (), 20, alone=True),
    _tests("training", "one GPU trains as the CPU twin does, in fp32, bf16 and fp16, and never waits", 60),
    _tests("model", "losses and gradients of a GPU equal the CPU's", 15),
    _tests("attention", "every attention backend equals plain formulas, with documents and windows", 30),
    _tests("checkpoint", "save on the GPU, load on the CPU and back; bit-exact resume", 40),
    _tests("experts", "experts' products and routing equal their twins", 40),
    _tests("compile", "compiled blocks equal eager ones, with recomputation and experts", 60),
    _tests("triton", "our Triton kernels equal their eager twins, and never wait", 90),
    _tests("graph", "a training step can be captured as a CUDA graph", 30),
    Part("real_run", "train, validate, save, resume, export through the launch script", "gpu.real_run", (), 75),
    Part("memory", "--dry_run predicts the measured peaks", "gpu.memory", (), 60),
    _tests("rest", "data, generation and optional packages", 40),
    _speed("dense128", "step time of 0.25B with heads of 128 next to transformers and plain torch", 100),
    Part(
        "operations", "the ways to attend, and each operation against its floor", "gpu.operations", (), 40, alone=True
    ),
    Part("kernels", "each Triton kernel next to its twin and its compiled twin", "gpu.kernels", (), 100, alone=True),
    Part("costs", "host waits, loader share, checkpoint stall, time to first step", "gpu.costs", (), 75, alone=True),
    _speed("experts", "step time of the experts model next to transformers' grouped one", 90),
    _speed("options", "what varlen, Triton kernels and recomputation change at 0.25B", 90),
    _speed("large", "step time of 1B next to transformers and plain torch", 120),
    _speed("dense64", "step time of 0.25B with heads of 64 next to transformers and plain torch", 90),
)
