"""The memory of a training run, by kind, computed from its configuration and layout without allocating it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.zero1.distributed_optimizer import Options
from tinytron.model import GPT
from tinytron.planner.states import PlannedBuffer, ResidentMemory, held, muon_working_memory, plan_buffers
from tinytron.planner.step import StepMemory, Workload, step_memory

# The workspace that cuBLAS keeps on Hopper and newer GPUs (32 MiB by default, and with CUBLAS_WORKSPACE_CONFIG=:4096:8).
CUBLAS_WORKSPACE = 32 * 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the rank that holds the most (``held.rank``), and bytes of a checkpoint's files.

    ``optimizer_step`` is the update's working memory in addition to ``held``. ``weights`` is the whole model in a
    checkpoint; ``saved`` is the main weights and optimizer states of all ranks; ``library`` is cuBLAS's workspace.
    """

    held: ResidentMemory
    step: StepMemory
    optimizer_step: int
    weights: int
    saved: int
    library: int

    @property
    def resident(self) -> int:
        """Bytes that are on the device all the time."""
        return self.held.total + self.step.tables + self.step.batch + self.library

    @property
    def moments(self) -> dict[str, int]:
        """The peak of each activity of the rank, in bytes."""
        return {
            "forward and backward": self.resident + self.step.peak,
            "optimizer step": self.resident + max(self.optimizer_step, self.held.sent),
            "start-up": self.held.start + self.step.tables,
        }

    @property
    def peak(self) -> int:
        """Bytes on the device at the highest peak."""
        return max(self.moments.values())

    @property
    def host(self) -> int:
        """Bytes of host memory on the first rank for the in-memory copy of a checkpoint."""
        return self.weights + self.held.snapshot

    @property
    def disk(self) -> int:
        """Bytes of a checkpoint's files."""
        return self.weights + self.saved


def plan_memory(
    model: GPT,
    groups: Sequence[Mapping[str, Any]],
    options: Options,
    work: Workload,
    layout: ParallelLayout,
    muon: Mapping[str, Any],
) -> MemoryPlan:
    """The plan for ``model`` (from ``meta_model``; it cannot be used again) and an optimizer with these ``groups`` and
    wrapper ``options``. ``muon`` has the settings of Muon's groups, if there are any."""
    specs = model.param_specs()
    buffers = plan_buffers(model, [{**group, **muon} for group in groups], specs, layout, options)
    of_rank = held(buffers, layout, options, work.device)
    weights = sum(spec.numel for spec in specs) * work.dtype.itemsize
    weights += sum(layer.router.bias.nbytes for layer in model.moe_layers)
    working = muon_working_memory(buffers, muon, work.device)
    return MemoryPlan(
        held=of_rank,
        step=step_memory(model, work, layout),
        optimizer_step=working,
        weights=weights,
        saved=_saved(buffers, layout),
        library=CUBLAS_WORKSPACE if work.device == "cuda" else 0,
    )


def _saved(buffers: Sequence[PlannedBuffer], layout: ParallelLayout) -> int:
    """Bytes of the whole model's main weights and states: each shard counts once, for every piece of a cut parameter."""
    return sum(
        b.saved_bytes(shard, first_piece=piece == 0)
        for b in buffers
        for shard in range(b.layout.num_shards)
        for piece in range(layout.size(layout.pieces(b.axes)))
    )
