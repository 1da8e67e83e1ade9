"""A readable report of the rank layout and of the optimizer's buffers."""

from __future__ import annotations

from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer

_MESHES = {"dense": "dense parameters", "expert": "experts"}
# The relation between the ranks of a group, by axis.
_AXES = {
    "sep": "share each sequence",
    "dp": "hold the same part of different sequences",
    "ep": "share the experts",
    "edp": "hold the same experts",
}


def describe_topology(layout: ParallelLayout, optimizer: DistributedOptimizer) -> str:
    """A readable report: the groups of each axis, and for each flat buffer its size, buckets, owners and padding."""
    factors = {name: " x ".join(f"{axis} {layout.size(axis)}" for axis in mesh) for name, mesh in layout.meshes.items()}
    meshes = ", ".join(f"{product} for {_MESHES.get(name, name)}" for name, product in factors.items())
    lines = [f"topology: {layout.world_size} processes = {meshes}"]
    for axis in (axis for mesh in layout.meshes.values() for axis in reversed(mesh)):
        groups = layout.ranks(axis)
        shown = " ".join(str(group) for group in groups[:8]) + (" ..." if len(groups) > 8 else "")
        lines.append(f"  {axis:<4} {_AXES.get(axis, 'are one group')}: {shown}")
    for buffer in optimizer.buffers:
        used = sum(slot.numel for slot in buffer.layout.slots)
        rule = "whole tensors" if buffer.own.whole_tensors else "elements"
        lines.append(
            f"  {len(buffer.members)} tensors, {used:,} elements in {len(buffer.layout.buckets)} buckets, "
            f"owned by {rule} over {buffer.num_shards} ranks, {buffer.layout.numel - used:,} elements of padding: "
            f"{buffer.members[0].name} ... {buffer.members[-1].name}"
        )
    sizes = ", ".join(f"{kind} {count / 2**20:.1f} MiB" for kind, count in optimizer.bytes_per_rank().items())
    lines.append(f"  this rank holds: {sizes}")
    return "\n".join(lines)
