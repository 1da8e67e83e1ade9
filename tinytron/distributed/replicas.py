"""A check that replicas have not diverged: parameters that several ranks hold must be bitwise equal on all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.errors import TrainingError

_CHUNK = 2**22  # elements hashed at a time: 32 MiB as int64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size in bytes
_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15 of SplitMix64 as a signed integer
_ODD2 = -4658895280553007687  # 0xBF58476D1CE4E5B9 of the same generator


def hash_bits(flat: torch.Tensor) -> torch.Tensor:
    """A hash of a tensor: one int64 on the device of ``flat`` that depends on the elements' bits (so NaN and -0.0 count)
    and positions.

    It is a sum modulo 2^64 over elements, each mixed with a weight that depends on its position. Mixing is one-to-one (odd
    factors, xor with the higher half), so a change of one element always changes the hash; changes of several elements
    cancel only by chance. Weights and mixing are those of SplitMix64 (Steele et al., OOPSLA 2014).
    """
    bits_N = flat.detach().reshape(-1).view(_INTEGERS[flat.element_size()])
    weights_C = torch.arange(1, min(_CHUNK, len(bits_N)) + 1, device=flat.device) * _ODD
    weights_C = (weights_C ^ (weights_C >> 30)) * _ODD2
    weights_C = (weights_C ^ (weights_C >> 27)) | 1
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in bits_N.split(_CHUNK):
        weights_c = weights_C[: len(chunk)]
        mixed_c = chunk.long() * weights_c
        mixed_c = (mixed_c ^ ((mixed_c >> 32) & 0xFFFFFFFF)) * weights_c
        total = total * _ODD + mixed_c.sum()
    return total


def check_replicas(step: int, optimizer: DistributedOptimizer, state: ParallelState) -> None:
    """Compare the parameters after ``step``, buffer by buffer, over the ranks that hold the same ones: dense parameters
    over the world, experts over the expert-data-parallel group. The host waits for the device. Collective over the
    world.

    Raises: TrainingError on every rank, naming the ranks that differ from the majority, the kind and a parameter.
    """
    optimizer.finish_gather()
    hashes_WB = _collect([hash_bits(buffer.param_data) for buffer in optimizer.buffers], state)
    for b, buffer in enumerate(optimizer.buffers):
        axes = buffer.own.axes
        kind = state.layout.mesh_of(axes)
        for group in state.layout.ranks(state.layout.replicas(axes)):
            hashes = [hashes_WB[rank][b] for rank in group]
            if len(set(hashes)) == 1:
                continue
            hashes_WP = _collect([hash_bits(param.data) for param in buffer.params], state)
            differs = [len({hashes_WP[rank][p] for rank in group}) > 1 for p in range(len(buffer.members))]
            names = [member.name for member, differing in zip(buffer.members, differs, strict=True) if differing]
            first = f" (first: {names[0]})" if names else ""  # without names the padding between parameters differs
            raise TrainingError(
                f"step {step}: the replicas diverged in their {kind} parameters{first}: {minority(group, hashes)}; rerun "
                "the same command to resume from the last checkpoint, and replace the machine if the same rank recurs"
            )


def minority(group: Sequence[int], hashes: Sequence[int]) -> str:
    """A clause such as ``rank 2 differs from the majority``; without a majority it lists the ranks that agree."""
    common, votes = Counter(hashes).most_common(1)[0]
    if 2 * votes > len(group):
        odd = [str(rank) for rank, value in zip(group, hashes, strict=True) if value != common]
        if len(odd) == 1:
            return f"rank {odd[0]} differs from the majority"
        return f"ranks {', '.join(odd)} differ from the majority"
    camps: dict[int, list[str]] = {}
    for rank, value in zip(group, hashes, strict=True):
        camps.setdefault(value, []).append(str(rank))
    return f"there is no majority among ranks {' | '.join(', '.join(camp) for camp in camps.values())}"


def _collect(hashes: list[torch.Tensor], state: ParallelState) -> list[list[int]]:
    """The hashes of every rank, by rank. Collective over the world."""
    own_N = torch.stack(hashes)
    all_WN = [torch.empty_like(own_N) for _ in range(state.layout.world_size)]
    dist.all_gather(all_WN, own_N, group=state.groups["world"])
    return [row.tolist() for row in all_WN]
