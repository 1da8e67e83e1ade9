"""Which part of a tensor each rank holds, for any mesh and any dimensions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytron.distributed import ParallelLayout
from tinytron.distributed.param_spec import ParamSpec, Shard
from tinytron.distributed.sharding import Box, Run, Sharding, whole_shape
from tinytron.errors import ConfigError


@dataclass(frozen=True)
class WideLayout(ParallelLayout):
    """A layout with a further axis: its name in the mesh, and its size."""

    tp: int = 1
    meshes: ClassVar[Mapping[str, tuple[str, ...]]] = {"dense": ("dp", "sep", "tp"), "expert": ("edp", "ep")}


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    """A tensor of up to four dimensions, cut over any axes of one mesh, in any order, some dimensions several times."""
    dp, sep, tp = (draw(st.integers(1, 3)) for _ in range(3))
    world = dp * sep * tp
    ep = draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    layout = WideLayout(world, sep, ep, tp)
    local = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    axes = draw(st.lists(st.sampled_from(draw(st.sampled_from([("dp", "sep", "tp"), ("edp", "ep")]))), unique=True))
    shards = tuple(Shard(axis, draw(st.integers(0, len(local) - 1))) for axis in axes)
    return Sharding(layout, whole_shape(local, shards, layout), shards)


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """Every element is its place in the flattened tensor."""
    return torch.arange(math.prod(shape)).view(shape)


@settings(deadline=None, max_examples=300)
@given(sharding=shardings())
def test_boxes_cut_the_tensor_and_make_it_whole_again(sharding: Sharding) -> None:
    layout, whole = sharding.layout, numbered(sharding.shape)
    parts = math.prod(layout.size(axis) for axis in sharding.axes)
    boxes = [sharding.box(rank) for rank in range(layout.world_size)]
    assert {box.size for box in boxes} == {sharding.local_shape}
    assert whole_shape(sharding.local_shape, sharding.shards, layout) == sharding.shape
    held = torch.cat([box.cut(whole).flatten() for box in boxes])
    assert (held.bincount() == layout.world_size // parts).all()  # every element, on as many ranks as every other
    for group in layout.ranks(layout.pieces(sharding.axes)):
        assert torch.equal(sharding.whole([boxes[rank].cut(whole) for rank in group]), whole)
    for group in layout.ranks(layout.replicas(sharding.axes)):
        assert len({boxes[rank] for rank in group}) == 1


@settings(deadline=None, max_examples=300)
@given(sharding=shardings(), data=st.data())
def test_runs_are_the_places_of_a_boxs_elements(sharding: Sharding, data: st.DataObject) -> None:
    box = sharding.box(data.draw(st.integers(0, sharding.layout.world_size - 1)))
    places = box.cut(numbered(sharding.shape)).flatten().tolist()
    first = data.draw(st.integers(0, len(places)))
    last = data.draw(st.integers(first, len(places)))
    for runs, expected in ((box.runs(), places), (box.runs(first, last), places[first:last])):
        assert [place for offset, length in runs for place in range(offset, offset + length)] == expected
        assert all(length > 0 for _, length in runs)
    if all(shard.dim == 0 for shard in sharding.shards):
        assert len(box.runs()) == 1


@settings(deadline=None)
@given(sharding=shardings())
def test_a_stack_holds_all_of_the_tensors_that_the_box_has_a_part_of(sharding: Sharding) -> None:
    for rank in range(sharding.layout.world_size):
        box = sharding.box(rank)
        stack = box.stack()
        assert (stack.start[0], stack.size) == (box.start[0], (box.size[0], *box.shape[1:]))
        whole = numbered(sharding.shape)
        assert torch.equal(box.within(stack).cut(stack.cut(whole)), box.cut(whole))


def test_the_picture_in_the_module() -> None:
    layout = WideLayout(4, ep=1, tp=2, sep=2)
    sharding = Sharding(layout, (4, 6), (Shard("sep", 0), Shard("tp", 1)))
    assert sharding.box(3) == Box((4, 6), (2, 3), (2, 3))
    assert sharding.box(3).runs() == (Run(15, 3), Run(21, 3))
    assert sharding.box(3).runs(2, 5) == (Run(17, 1), Run(21, 2))
    assert [sharding.box(rank).start for rank in range(4)] == [(0, 0), (0, 3), (2, 0), (2, 3)]
    assert Box.whole((4, 6)).runs(5, 20) == (Run(5, 15),)
    assert Box.whole(()).runs() == (Run(0, 1),)


def test_experts_of_1024_ranks() -> None:
    layout = ParallelLayout(1024, sep=4, ep=64)
    spec = ParamSpec("experts", (256, 32, 16), "matrix", (Shard("ep", 0),), stacked=True)
    sharding = Sharding.of(spec, layout)
    assert (layout.pieces(spec.axes), layout.replicas(spec.axes)) == ("ep", "edp")
    for rank in range(1024):
        first = rank % 64 * 4
        assert sharding.box(rank) == Box(spec.shape, (first, 0, 0), (4, 32, 16))
        assert sharding.box(rank).runs(7, 1000) == (Run(first * 512 + 7, 993),)
    dense = ParamSpec("norm", (32,), "norm")
    assert (layout.pieces(dense.axes), layout.replicas(dense.axes)) == ("self", "world")
    assert {Sharding.of(dense, layout).box(rank) for rank in range(1024)} == {Box.whole((32,))}


def test_a_further_axis_of_1024_ranks() -> None:
    layout = WideLayout(1024, sep=4, ep=32, tp=8)
    sharding = Sharding(layout, (64, 128), (Shard("tp", 1),))
    assert layout.dp == 32
    assert (layout.pieces(sharding.axes), layout.replicas(sharding.axes)) == ("tp", "dp*sep")
    assert layout.ranks("tp")[1] == list(range(8, 16))
    assert layout.ranks("dp*sep")[3] == list(range(3, 1024, 8))
    assert layout.ranks("dp*tp")[0] == [32 * d + t for d, t in itertools.product(range(32), range(8))]
    assert layout.axes == ("world", "dp", "sep", "tp", "dp*sep", "dp*tp", "sep*tp", "edp", "ep", "self")
    for axis in layout.axes:
        groups = layout.ranks(axis)
        assert sorted(itertools.chain(*groups)) == list(range(1024))
        assert {len(group) for group in groups} == {layout.size(axis)}
        assert all(layout.coordinate(rank, axis) == place for group in groups for place, rank in enumerate(group))
    for rank in range(1024):
        assert sharding.box(rank).start == (0, rank % 8 * 16)


def test_a_dimension_that_cannot_be_cut_is_an_error() -> None:
    sharding = Sharding(WideLayout(4, tp=4), (8, 6), (Shard("tp", 1),))
    with pytest.raises(ConfigError, match=r"dimension 1 of \[8, 6\] .* 4 equal parts; use a size of axis tp"):
        sharding.box(0)


def test_axes_of_different_meshes_do_not_cut_one_tensor() -> None:
    layout = ParallelLayout(4, sep=2, ep=4)
    with pytest.raises(ConfigError, match=r"no mesh has the axes sep, ep together; .* dp x sep, edp x ep"):
        layout.replicas(("sep", "ep"))


def test_sizes_of_further_axes_divide_what_the_others_leave() -> None:
    with pytest.raises(ConfigError, match=r"--tp_size 3 must divide the number of processes, 8; use one of"):
        WideLayout(8, tp=3)
    with pytest.raises(ConfigError, match=r"--sep_size 4 must divide .*, 8 / 4; use one of \[1, 2\]"):
        WideLayout(8, sep=4, tp=4)
