"""A layout and this process's place in it: one frozen object that is passed down and never global."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from tinytron.distributed.layout import ParallelLayout


@dataclass(frozen=True)
class ParallelState:
    """The process groups of this rank, one per axis of ``layout.axes``, and the device it computes on."""

    layout: ParallelLayout
    rank: int
    device: torch.device
    groups: dict[str, dist.ProcessGroup]

    @classmethod
    def create(cls, layout: ParallelLayout, device: torch.device) -> ParallelState:
        """Build every group. Collective over the world, which must be initialized (``dist.init_process_group``).

        Axes whose groups hold the same ranks share one process group, which saves NCCL communicators and their memory.
        """
        made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}
        groups = {}
        for axis in layout.axes:  # creating a group is collective, so every rank creates every axis in this order
            members = tuple(tuple(group) for group in layout.ranks(axis))
            if members not in made:
                made[members] = dist.new_subgroups_by_enumeration([list(group) for group in members])[0]
            groups[axis] = made[members]
        return cls(layout, dist.get_rank(), device, groups)

    @classmethod
    def of_group(cls, group: dist.ProcessGroup, device: torch.device) -> ParallelState:
        """A state whose world is ``group``, for parameters that are not sharded. It has no other groups."""
        return cls(ParallelLayout(dist.get_world_size(group)), dist.get_rank(group), device, {"world": group})

    def group_rank(self, axis: str) -> int:
        """This process's index within its group of ``axis``."""
        return self.layout.coordinate(self.rank, axis)

    @property
    def is_master(self) -> bool:
        """True on the one process that writes logs and consolidated files."""
        return self.rank == 0
