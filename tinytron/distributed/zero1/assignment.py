"""The assignment of optimizer states to ranks, as earlier versions let callers give it, and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist

from tinytron.distributed.zero1.flat_buffer import FlatBuffer
from tinytron.errors import ConfigError


def check_assignment(
    group: dist.ProcessGroup, ranks_map: Mapping[int, int] | Sequence[int] | None, num_parts: int | None
) -> None:
    """Check that part i of ``num_parts`` belongs to the i-th rank of ``group``. ``ranks_map`` gives each part's rank, by
    its number in the world or in the group. Raises: ConfigError for another assignment, naming the only possible one."""
    members = dist.get_process_group_ranks(group)
    if num_parts is not None and num_parts != len(members):
        raise ConfigError(
            f"DistributedOptimizer: num_parts {num_parts} must be the size of process_group, because every rank owns one "
            f"part; use {len(members)}, or leave it out"
        )
    if ranks_map is None:
        return
    given = dict(ranks_map) if isinstance(ranks_map, Mapping) else dict(enumerate(ranks_map))
    if given not in (dict(enumerate(members)), dict(enumerate(range(len(members))))):
        raise ConfigError(
            f"DistributedOptimizer: ranks_map {ranks_map} must give part i to the i-th rank of process_group, because "
            f"parts are exchanged in the order of ranks; use {members}, or leave it out"
        )


def assignment_table(buffers: Sequence[FlatBuffer]) -> str:
    """A table of the elements, and the tensors or parts of tensors, whose states each rank of a buffer's group owns. Parts
    count from 0 in the order of the group's ranks."""
    lines = ["optimizer states by rank:"]
    for buffer in buffers:
        members = dist.get_process_group_ranks(buffer.own.group)
        if not buffer.own.shard:
            names = f"{buffer.members[0].name} ... {buffer.members[-1].name}"
            lines.append(f"  every rank owns all of {len(buffer.members)} tensors, {names}")
            continue
        for part, rank in enumerate(members):
            held = [
                (buffer.members[slot.index].name, high - low)
                for slot in buffer.layout.slots
                for start, end in [buffer.layout.owned(slot.bucket, part)]
                if (low := max(start, slot.start)) < (high := min(end, slot.end))
            ]
            names = f": {held[0][0]} ... {held[-1][0]}" if held else ""
            lines.append(
                f"  part {part} on rank {rank}: {sum(count for _, count in held):,} elements of {len(held)} tensors{names}"
            )
    return "\n".join(lines)
