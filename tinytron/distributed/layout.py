"""The placement of ranks on meshes: pure arithmetic, so a 1,024-rank layout can be tested on a laptop."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

from tinytron.errors import ConfigError


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class ParallelLayout:
    """One world of ranks, factored once per mesh: ``dp x sep`` for dense tensors, ``edp x ep`` for experts.

    Ranks along the rightmost axis of a mesh are adjacent. The size of the leftmost axis is whatever
    the others leave; the size of every other axis is a field here. So a new axis needs only its name
    in ``meshes`` and its field. ``ep`` 0 means ``sep``, the documented sequence-expert joint group.

    Where a method takes an axis, it may also be ``"world"`` (all ranks), ``"self"`` (each rank
    alone), or several axes of one mesh joined by ``*`` (``"dp*tp"``: ranks that differ in either).

    Raises: ConfigError if a size does not divide ``world_size``.
    """

    world_size: int
    sep: int = 1
    ep: int = 0

    meshes: ClassVar[Mapping[str, tuple[str, ...]]] = {"dense": ("dp", "sep"), "expert": ("edp", "ep")}

    def __post_init__(self) -> None:
        if self.ep == 0:
            object.__setattr__(self, "ep", self.sep)
        for mesh in self.meshes.values():
            left = self.world_size
            for axis in reversed(mesh[1:]):
                size: int = getattr(self, axis)
                if size not in divisors(left):
                    taken = "" if left == self.world_size else f" / {self.world_size // left}"
                    raise ConfigError(
                        f"--{axis}_size {size} must divide the number of processes, {self.world_size}{taken}; "
                        f"use one of {divisors(left)}"
                    )
                left //= size

    @property
    def dp(self) -> int:
        """Number of data-parallel replicas of each sequence-parallel group."""
        return self.size("dp")

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis that has process groups: the world, mesh axes and their products, and each rank alone."""
        names = {"world": None}
        for mesh in self.meshes.values():
            for count in range(1, len(mesh)):
                names |= {"*".join(chosen): None for chosen in combinations(mesh, count)}
        return (*names, "self")

    def size(self, axis: str) -> int:
        """Number of ranks in each group of ``axis``."""
        size = 1
        for length, _ in self._factors(axis):
            size *= length
        return size

    def coordinate(self, rank: int, axis: str) -> int:
        """The index of ``rank`` within its group of ``axis``."""
        return _place(rank, self._factors(axis))

    def ranks(self, axis: str) -> list[list[int]]:
        """Every group of ``axis``: 4 ranks with sep=2 give ``ranks("sep") == [[0, 1], [2, 3]]``."""
        factors = self._factors(axis)
        firsts = [rank for rank in range(self.world_size) if _place(rank, factors) == 0]
        return [self.group_of(first, axis) for first in firsts]

    def group_of(self, rank: int, axis: str) -> list[int]:
        """The group of ``axis`` that ``rank`` is in, ascending."""
        factors = self._factors(axis)
        offsets = [0]
        for length, stride in factors:
            offsets = [offset + i * stride for offset in offsets for i in range(length)]
        first = rank - offsets[_place(rank, factors)]
        return [first + offset for offset in offsets]

    def mesh_of(self, axes: Collection[str]) -> str:
        """The mesh of a tensor that is cut over ``axes``; ``dense`` if it is not cut.

        Raises: ConfigError if no mesh has all of ``axes``.
        """
        for name, mesh in self.meshes.items():
            if set(axes) <= set(mesh):
                return name
        known = ", ".join(" x ".join(mesh) for mesh in self.meshes.values())
        raise ConfigError(f"no mesh has the axes {', '.join(axes)} together; use those of one of {known}")

    def pieces(self, axes: Collection[str]) -> str:
        """The axis along which ranks hold different pieces of a tensor that is cut over ``axes``."""
        mesh = self.meshes[self.mesh_of(axes)]
        return _product(mesh, [axis for axis in mesh if axis in axes])

    def replicas(self, axes: Collection[str]) -> str:
        """The axis along which ranks hold the same piece of a tensor that is cut over ``axes``.

        Over exactly these ranks the tensor's gradient is summed and its optimizer state sharded: the
        world for dense parameters, ``edp`` for experts. That is right on every mesh because the
        objective is the sum over all ranks. If several ranks compute the same loss, the global number
        of targets counts it just as many times.
        """
        mesh = self.meshes[self.mesh_of(axes)]
        return _product(mesh, [axis for axis in mesh if axis not in axes])

    def _factors(self, axis: str) -> list[tuple[int, int]]:
        """Size and stride of each mesh axis in ``axis``, slowest first."""
        if axis == "self":
            return []
        if axis == "world":
            return [(self.world_size, 1)]
        names = axis.split("*")
        mesh = self.meshes[self.mesh_of(names)]
        found: dict[str, tuple[int, int]] = {}
        stride = 1
        for name in reversed(mesh):
            length: int = self.world_size // stride if name == mesh[0] else getattr(self, name)
            found[name] = (length, stride)
            stride *= length
        return [found[name] for name in mesh if name in names]


def _place(rank: int, factors: list[tuple[int, int]]) -> int:
    place = 0
    for length, stride in factors:
        place = place * length + rank // stride % length
    return place


def _product(mesh: tuple[str, ...], axes: list[str]) -> str:
    """The name of the product of several axes of ``mesh``."""
    if not axes:
        return "self"
    return "world" if len(axes) == len(mesh) else "*".join(axes)
