"""The memory of a training run, by kind, from its configuration and layout: nothing of it is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.zero1.distributed_optimizer import Options
from tinytron.model import GPT
from tinytron.planner.states import PlannedBuffer, ResidentMemory, held, muon_working_memory, plan_buffers
from tinytron.planner.step import StepMemory, Workload, step_memory

# What cuBLAS keeps on a GPU since Hopper (32 MiB by default, and what CUBLAS_WORKSPACE_CONFIG=:4096:8 asks for).
CUBLAS_WORKSPACE = 32 * 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the rank that holds most (``held.rank``), and of the files of a checkpoint.

    ``optimizer_step`` is working memory of the update beside what is held; ``weights`` are those of the whole model as a
    checkpoint has them, ``saved`` main weights and optimizer states of all ranks; ``library`` is kept by cuBLAS.
    """

    held: ResidentMemory
    step: StepMemory
    optimizer_step: int
    weights: int
    saved: int
    library: int

    @property
    def resident(self) -> int:
        """What is on the device all the time."""
        return self.held.total + self.step.tables + self.step.batch + self.library

    @property
    def moments(self) -> dict[str, int]:
        """The most that is alive at a time, by what the rank does then."""
        return {
            "forward and backward": self.resident + self.step.peak,
            "optimizer step": self.resident + max(self.optimizer_step, self.held.sent),
            "start-up": self.held.start + self.step.tables,
        }

    @property
    def peak(self) -> int:
        """Bytes on the device at the fullest moment."""
        return max(self.moments.values())

    @property
    def host(self) -> int:
        """Host memory of the first rank for the copy that a checkpoint is written from."""
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
    """The plan of ``model`` (made by ``meta_model``; used up) and of the optimizer with these ``groups`` and wrapper
    ``options``; ``muon`` are the settings of Muon's groups, if there are such."""
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
    """Main weights and states of the whole model: each shard once, of every piece of the parameters that are cut."""
    return sum(
        b.saved_bytes(shard, first_piece=piece == 0)
        for b in buffers
        for shard in range(b.layout.num_shards)
        for piece in range(layout.size(layout.pieces(b.axes)))
    )
