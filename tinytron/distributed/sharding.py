"""The part of a global tensor that each rank holds: pure arithmetic on a layout, without processes.

    Sharding(layout, (4, 6), (Shard("a", 0), Shard("b", 1))) with 2 ranks along each axis, on the last rank:

        . . . . . .        Box(shape=(4, 6), start=(2, 3), size=(2, 3))
        . . . . . .
        . . . X X X        its elements in the flattened global tensor:
        . . . X X X        Run(15, 3), Run(21, 3)

ZeRO, the gradient norm, checkpoints, conversion, the planner and initialization all use this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.param_spec import ParamSpec, Shard
from tinytron.errors import ConfigError


class Run(NamedTuple):
    """``length`` consecutive elements of a flattened tensor, starting at ``offset``."""

    offset: int
    length: int


@dataclass(frozen=True)
class Box:
    """A box in a global tensor of ``shape``: along each dimension d, ``size[d]`` elements starting at ``start[d]``."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that covers a whole tensor of ``shape``."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements of the global tensor."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of the box in the global tensor."""
        return tuple(slice(first, first + count) for first, count in zip(self.start, self.size, strict=True))

    def with_matrices(self, rows: int, columns: int) -> Box:
        """The corresponding box of a tensor with a ``rows`` x ``columns`` matrix for each matrix of this one."""
        last = (rows, columns)
        return Box((*self.shape[:-2], *last), (*self.start[:-2], 0, 0), (*self.size[:-2], *last))

    def stack(self) -> Box:
        """The box extended to whole tensors: every tensor of the stack (along dimension 0) that this box has a part of."""
        rest = self.shape[1:]
        return Box(self.shape, (self.start[0], *(0 for _ in rest)), (self.size[0], *rest))

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of the global tensor ``whole`` that is in the box, as a view."""
        return whole[self.slices]

    def within(self, outer: Box) -> Box:
        """The same elements as a box in the tensor that consists of ``outer`` only."""
        start = tuple(own - other for own, other in zip(self.start, outer.start, strict=True))
        return Box(outer.size, start, self.size)

    def runs(self, first: int = 0, last: int | None = None) -> tuple[Run, ...]:
        """The positions of elements ``[first, last)`` of the flattened box (default: all) in the flattened global tensor.

        The runs are in the box's order. There is one run if at most dimension 0 is cut, otherwise about
        one per row of the last dimension that is cut.
        """
        last = math.prod(self.size) if last is None else last
        if last <= first:
            return ()
        strides = [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        base = sum(place * stride for place, stride in zip(self.start, strides, strict=True))
        inner = max((d for d, count in enumerate(self.size) if count != self.shape[d]), default=0)  # last dimension cut
        length = math.prod(self.size[inner:])  # elements that are consecutive in the global tensor as well
        found = []
        for row in range(first // length, -(-last // length)):
            places = [int(place) for place in np.unravel_index(row, self.size[:inner])]
            offset = base + sum(place * stride for place, stride in zip(places, strides, strict=False))
            low, high = max(first - row * length, 0), min(last - row * length, length)
            found.append(Run(offset + low, high - low))
        return tuple(found)


@dataclass(frozen=True)
class Sharding:
    """A global tensor of ``shape`` that is cut into equal boxes, along each of ``shards``, over the ranks of ``layout``.

    If several shards cut the same dimension, the later ones cut the boxes of the earlier ones. Methods
    that compute a box raise a ConfigError if a dimension cannot be cut into equal parts.
    """

    layout: ParallelLayout
    shape: tuple[int, ...]
    shards: tuple[Shard, ...] = ()

    @classmethod
    def of(cls, spec: ParamSpec, layout: ParallelLayout) -> Sharding:
        """The sharding of parameter ``spec``."""
        return cls(layout, spec.shape, spec.shards)

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that the tensor is cut over."""
        return tuple(dict.fromkeys(shard.axis for shard in self.shards))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of every rank's box."""
        return self.box(0).size

    def box(self, rank: int) -> Box:
        """The box that ``rank`` holds."""
        start, size = [0] * len(self.shape), list(self.shape)
        for axis, dim in self.shards:
            parts = self.layout.size(axis)
            if size[dim] % parts:
                raise ConfigError(
                    f"dimension {dim} of {list(self.shape)} cannot be cut into {parts} equal parts; "
                    f"use a size of axis {axis} that divides {size[dim]}"
                )
            size[dim] //= parts
            start[dim] += self.layout.coordinate(rank, axis) * size[dim]
        return Box(self.shape, tuple(start), tuple(size))

    def whole(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The global tensor assembled from all ``pieces``, which are in the order of ``layout.pieces(axes)``."""
        holders = self.layout.group_of(0, self.layout.pieces(self.axes))
        out = pieces[0].new_empty(self.shape)
        for rank, piece in zip(holders, pieces, strict=True):
            self.box(rank).cut(out).copy_(piece)
        return out


def whole_shape(local: Sequence[int], shards: Sequence[Shard], layout: ParallelLayout) -> tuple[int, ...]:
    """The shape of the global tensor whose boxes have the shape ``local``."""
    shape = list(local)
    for axis, dim in shards:
        shape[dim] *= layout.size(axis)
    return tuple(shape)


def box_of(spec: ParamSpec, state: ParallelState | None) -> Box:
    """The part of parameter ``spec`` that this process holds; without a ``state``, all of it."""
    return Sharding.of(spec, state.layout).box(state.rank) if state is not None else Box.whole(spec.shape)
