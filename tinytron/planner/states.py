"""The memory that is held between steps: parameters, gradients, main weights and optimizer states. It follows from the
layouts of the flat buffers and matches the wrapped optimizer's allocations byte for byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.param_spec import ParamSpec
from tinytron.distributed.zero1.buckets import BufferLayout, plan_buffer
from tinytron.distributed.zero1.distributed_optimizer import Options
from tinytron.distributed.zero1.grouping import group_parameters

SCALAR = 4  # bytes of AdamW's step counter, in fp32


@dataclass(frozen=True)
class PlannedBuffer:
    """One flat buffer before it exists: its layout, the shapes (of this rank) and names of its members, the mesh ``axes``
    that cut them, and the options of its optimizer group. ``averaged``: the weights have moving averages."""

    layout: BufferLayout
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    axes: tuple[str, ...]
    options: Mapping[str, Any]
    averaged: bool = False

    @property
    def main_dtype(self) -> torch.dtype:
        """Precision of gradients, main weights and states."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def whole_tensors(self) -> bool:
        """True if ranks own whole matrices (for Muon) instead of ranges of elements."""
        return bool(self.options.get("kind") == "muon")

    @property
    def owned(self) -> int:
        """Number of elements that each rank owns, including padding."""
        return self.layout.numel // self.layout.num_shards

    @property
    def own_parameters(self) -> int:
        """Bytes of the parameters without padding."""
        return sum(math.prod(shape) for shape in self.shapes) * self.dtype.itemsize

    @property
    def main_bytes(self) -> int:
        """Bytes of one shard's main weights; none if the parameters have the same precision."""
        return self.owned * self.main_dtype.itemsize if self.dtype != self.main_dtype else 0

    def shard_of(self, rank: int, layout: ParallelLayout, sharded: bool) -> int:
        """The shard that ``rank`` of the world owns: its index among the ranks that hold the same parameters."""
        return layout.coordinate(rank, layout.replicas(self.axes)) if sharded else 0

    def state_bytes(self, shard: int) -> int:
        """Bytes of one shard's optimizer states."""
        size = self.main_dtype.itemsize
        if not self.whole_tensors:
            return (2 + self.averaged) * self.owned * size + SCALAR * len(self.layout.buckets)
        shapes = [self.shapes[index] for index in self.owned_tensors(shard)]
        return sum((muon_state(shape, self.options) + self.averaged * math.prod(shape)) * size for shape in shapes)

    def owned_tensors(self, shard: int) -> list[int]:
        """The indices of the members that ``shard`` owns (with ``whole_tensors``)."""
        ranges = [self.layout.owned(bucket, shard) for bucket in range(len(self.layout.buckets))]
        return [
            slot.index for slot in self.layout.slots if ranges[slot.bucket][0] <= slot.start < ranges[slot.bucket][1]
        ]

    def saved_bytes(self, shard: int, *, first_piece: bool = True) -> int:
        """Bytes of one shard in a checkpoint: states, and main weights that are more precise than the parameters, without
        padding. A tensor's counters are stored only once, with its first piece."""
        size = self.main_dtype.itemsize
        copies = int(self.dtype != self.main_dtype) + self.averaged
        total = 0
        for slot in self.layout.slots:
            first, last = self.layout.owned(slot.bucket, shard)
            here = max(0, min(last, slot.end) - max(first, slot.start))
            if not here:
                continue
            if self.whole_tensors:
                total += (copies * here + muon_state(self.shapes[slot.index], self.options)) * size
            else:
                total += (2 + copies) * here * size + SCALAR * (first <= slot.start and first_piece)
        return total


def muon_state(shape: Sequence[int], options: Mapping[str, Any]) -> int:
    """Number of elements in Muon's states for one matrix or a stack of matrices: the momentum, and NorMuon's mean squares,
    one for each row or each column, whichever there are more of."""
    second = math.prod(shape[:-2]) * max(shape[-2:]) if options.get("normuon") else 0
    return math.prod(shape) + second


def plan_buffers(
    model: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    specs: Sequence[ParamSpec],
    layout: ParallelLayout,
    options: Options,
) -> list[PlannedBuffer]:
    """The flat buffers that ``DistributedOptimizer`` builds for ``model`` and the optimizer's ``groups``: one for each
    combination of group, precision and sharding axes."""
    names = {id(p): name for name, p in model.named_parameters()}
    by_name = {spec.name: spec for spec in specs}
    buffers = []
    for given in groups:
        for group in group_parameters(given["params"], given, names, by_name):
            shards = layout.size(layout.replicas(group.axes)) if options.shard else 1
            numels = [p.numel() for p in group.params]
            shapes = tuple(tuple(p.shape) for p in group.params)
            planned = plan_buffer(numels, shards, options.bucket_numel, whole_tensors=group.whole_tensors)
            members = tuple(spec.name for spec in group.specs)
            averaged = options.ema_decay > 0
            buffers.append(PlannedBuffer(planned, members, shapes, group.params[0].dtype, group.axes, given, averaged))
    return buffers


@dataclass(frozen=True)
class ResidentMemory:
    """Bytes that one rank holds between steps.

    ``exchange`` is for buffers of gradients on the wire; ``sent`` is for those that exist only until the gradients of a
    step are summed. ``start`` is the peak while the buffers are built one after the other and the model's original memory
    still exists. ``snapshot`` is the copy in the first rank's host memory for a checkpoint, without the weights.
    """

    rank: int
    parameters: int
    gradients: int
    main: int
    optimizer: int
    exchange: int
    sent: int
    start: int
    snapshot: int

    @property
    def total(self) -> int:
        """All bytes that stay on the device from step to step."""
        return self.parameters + self.gradients + self.main + self.optimizer + self.exchange


def held(buffers: Sequence[PlannedBuffer], layout: ParallelLayout, options: Options, device: str) -> ResidentMemory:
    """The memory of the rank that holds the most; ranks differ if they own whole matrices (for Muon)."""
    states = [[b.state_bytes(shard) for shard in range(b.layout.num_shards)] for b in buffers]

    def optimizer_of(rank: int) -> int:
        shards = [b.shard_of(rank, layout, options.shard) for b in buffers]
        return sum(its[shard] for its, shard in zip(states, shards, strict=True))

    rank = max(range(layout.world_size), key=optimizer_of)
    exchange = sent = 0
    if options.shard and (options.reduce_dtype is not None or device == "cpu"):
        for b in buffers:
            wire = options.reduce_dtype or b.main_dtype
            arriving = (b.layout.num_shards - 1) * b.owned * wire.itemsize
            exchange += arriving
            sent += arriving if wire != b.main_dtype else 0
    gradients = sum(b.layout.numel * b.main_dtype.itemsize for b in buffers)
    if not options.grad_as_view:  # autograd allocates gradients of its own, which are copied into the buffers
        gradients += sum(math.prod(shape) * b.main_dtype.itemsize for b in buffers for shape in b.shapes)
    return ResidentMemory(
        rank=rank,
        parameters=sum(b.layout.numel * b.dtype.itemsize for b in buffers),
        gradients=gradients,
        main=sum(b.main_bytes for b in buffers),
        optimizer=optimizer_of(rank),
        exchange=exchange,
        sent=sent,
        start=_start(buffers),
        snapshot=sum(b.saved_bytes(0) for b in buffers),
    )


def _start(buffers: Sequence[PlannedBuffer]) -> int:
    """The peak in bytes while the parameters move into their buffers, one buffer after the other."""
    most = made = 0
    left = sum(b.own_parameters for b in buffers)
    for b in buffers:
        made += b.layout.numel * (b.dtype.itemsize + b.main_dtype.itemsize)
        most = max(most, made + left)
        left -= b.own_parameters
        made += b.main_bytes
    return max(most, made)


def muon_working_memory(buffers: Sequence[PlannedBuffer], settings: Mapping[str, Any], device: str) -> int:
    """Peak bytes that Muon's step needs in addition to its states. Matrices are updated one after the other, so the largest
    one determines it. ``settings`` are the constructor's options (``ns_steps``, ``normuon``, ``cautious``)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tinytron.optim import Muon
    from tinytron.planner.ledger import AllocationTracker

    most = 0
    kinds = {(shape, b.options["row_blocks"], b.main_dtype) for b in buffers if b.whole_tensors for shape in b.shapes}
    for shape, row_blocks, dtype in kinds:
        with FakeTensorMode():
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
            parameter.grad = torch.empty(shape, dtype=dtype)
            found = torch.zeros(())
            muon = Muon([{"params": [parameter], "kind": "muon", "row_blocks": row_blocks}], lr=1e-3, **settings)
            muon.found_inf = found  # as in every step after the first
            ledger = AllocationTracker([parameter, parameter.grad, found], on_cpu=device == "cpu")
            with ledger:
                muon.step()
            kept = muon_state(shape, settings) * dtype.itemsize
        most = max(most, ledger.peak - kept)
    return most
