"""P1, P2: any layout trains as one plain process does: losses, gradients, norms and weights over several steps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.parity import CLIPPED, EXPERTS, Case, Mask, Precision, differences, run_case
from tests.helpers.ranks import Ranks
from tests.naive.training import Recipe

Pools = Callable[[int], Ranks]
ACCUMULATIONS = [
    pytest.param(world, accumulation, mask, id=f"world{world}-accumulation{accumulation}-mask_{mask}")
    for world, accumulation, mask in itertools.product((1, 2, 4), (1, 2), ("none", "uneven", "rank"))
    if not (world == 1 and mask == "rank")
]
LAYOUTS = [
    (world, sep, ep)
    for world, sep, ep in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4))
    if sep <= world and ep <= world
]
DENSE_LAYOUTS = [(world, sep) for world, sep, ep in LAYOUTS if ep == 1]
# Every pair of values of (ZeRO, overlap, accumulation); the full product is for `slow`.
PAIRS = [(True, True, 1), (True, False, 2), (False, True, 2), (False, False, 1)]
PRODUCT = list(itertools.product((True, False), (True, False), (1, 2)))
# Kinds of expert layers. In fp64: rounding in fp32 may flip a near tie of the router, and then results differ at once.
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"experts": EXPERTS},
    "sigmoid": {"experts": dataclasses.replace(EXPERTS, score="sigmoid", scope="batch"), "shared_experts": 1},
    "top1": {
        "experts": dataclasses.replace(EXPERTS, top_k=1, renormalized=False, first_k_dense=1),
        "shared_experts": 2,
    },
    "idle": {"experts": dataclasses.replace(EXPERTS, scope="batch", top_k=3, renormalized=False), "idle_expert": True},
}


def _assert_parity(ranks: Pools, case: Case, folder: Path, tolerance: float = 0.0) -> None:
    results = ranks(case.world).run(run_case, case, folder)
    assert not (found := differences(case, results, tolerance)), f"{case}:\n" + "\n".join(found)


# Dense models.


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("shard", [True, False], ids=["shard", "replicate"])
@pytest.mark.parametrize(("world", "accumulation", "mask"), ACCUMULATIONS)
@pytest.mark.sample(20)
def test_adamw(
    ranks: Pools, tmp_path: Path, world: int, accumulation: int, mask: Mask, shard: bool, precision: Precision
) -> None:
    case = Case(world, accumulation, mask, shard, precision=precision)
    for view in (True, False):  # both precisions together: all four combinations with the bucket size
        small = view == (precision == "fp32")
        _assert_parity(ranks, dataclasses.replace(case, view=view, small_buckets=small), tmp_path / str(view))


@pytest.mark.parametrize(("world", "sep"), [layout for layout in DENSE_LAYOUTS if layout[1] > 1])
@pytest.mark.parametrize(("shard", "overlap", "accumulation"), PAIRS)
@pytest.mark.sample(5)
def test_sequence_parallelism(
    ranks: Pools, tmp_path: Path, world: int, sep: int, shard: bool, overlap: bool, accumulation: int
) -> None:
    case = Case(world, accumulation, "uneven", shard, sep, overlap=overlap, small_buckets=True)
    _assert_parity(ranks, case, tmp_path / "uneven")
    others = {"mask": "rank", "precision": "fp64", "kv_heads": 1 if shard else 4, "small_buckets": False}
    _assert_parity(ranks, dataclasses.replace(case, **others), tmp_path / "rank")


@pytest.mark.slow
@pytest.mark.parametrize(("world", "sep"), DENSE_LAYOUTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", ["uneven", "rank"])
def test_the_dense_matrix(ranks: Pools, tmp_path: Path, world: int, sep: int, kv_heads: int, mask: Mask) -> None:
    for number, (shard, overlap, accumulation) in enumerate(PRODUCT):
        case = Case(world, accumulation, mask if world > 1 else "none", shard, sep, overlap=overlap, kv_heads=kv_heads)
        more: dict[str, Any] = {"small_buckets": number % 2 == 0, "precision": "fp32" if mask == "uneven" else "fp64"}
        _assert_parity(ranks, dataclasses.replace(case, **more), tmp_path / str(number))


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("shard", [True, False], ids=["shard", "replicate"])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.sample(4)
def test_sgd_with_momentum(ranks: Pools, tmp_path: Path, world: int, shard: bool, precision: Precision) -> None:
    recipe = Recipe(optimizer="sgd", max_lr=0.1, clip=0.3)
    for accumulation, small in ((1, True), (2, False)):
        case = Case(world, accumulation, "uneven", shard, precision=precision, recipe=recipe, small_buckets=small)
        _assert_parity(ranks, case, tmp_path / str(accumulation))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"tied": False}, id="untied"),
        pytest.param({"recipe": Recipe(clip=0.0)}, id="never_clipped"),
        pytest.param({"recipe": Recipe(clip=100.0)}, id="limit_not_reached"),
        pytest.param({"mask": "all"}, id="no_valid_target"),
    ],
)
@pytest.mark.sample(6)
def test_variants(ranks: Pools, tmp_path: Path, world: int, change: dict[str, Any]) -> None:
    case = dataclasses.replace(Case(world, mask="uneven", precision="fp64"), **change)
    for shard in (True, False):
        _assert_parity(ranks, dataclasses.replace(case, shard=shard), tmp_path / str(shard))


def test_small_buckets_are_many(ranks: Pools, tmp_path: Path) -> None:
    for small, at_least in ((True, 5), (False, 2)):
        case = Case(2, small_buckets=small)
        assert ranks(2).run(run_case, case, tmp_path / str(small))[0]["buckets"] >= at_least


@pytest.mark.parametrize(("world", "sep", "ep", "kind"), [(2, 1, 1, None), (4, 2, 1, None), (4, 2, 2, "softmax")])
def test_a_bf16_wire_is_close(ranks: Pools, tmp_path: Path, world: int, sep: int, ep: int, kind: str | None) -> None:
    """A rank's gradient is rounded by up to 2^-9 of itself, and sums over ranks may be smaller than their parts; what
    is lost stays small, and something is lost."""
    precision: Precision = "fp64" if kind else "fp32"
    case = Case(world, 2, "uneven", True, sep, ep, **KINDS.get(kind or "", {}), wire="bf16", precision=precision)
    _assert_parity(ranks, case, tmp_path, tolerance=2.0**-6)
    assert differences(case, ranks(world).run(run_case, case, tmp_path / "again"), tolerance=2.0**-14)


# Experts.


@pytest.mark.parametrize(("world", "sep", "ep"), LAYOUTS)
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.sample(9)
def test_experts(ranks: Pools, tmp_path: Path, world: int, sep: int, ep: int, number: int) -> None:
    """Two of the four pairs per layout, so that layouts with the same groups get all."""
    place = LAYOUTS.index((world, sep, ep))
    shard, overlap, accumulation = PAIRS[(2 * place + number + place // 4) % 4]
    kind = list(KINDS)[(place + 2 * number) % 4]
    mask: Mask = "uneven" if number == 0 or world == 1 else "rank"
    case = Case(world, accumulation, mask, shard, sep, ep, overlap=overlap, small_buckets=number == 1, **KINDS[kind])
    _assert_parity(ranks, dataclasses.replace(case, precision="fp64"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "sep", "ep"), LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_of_experts(ranks: Pools, tmp_path: Path, world: int, sep: int, ep: int, kind: str) -> None:
    for number, (shard, overlap, accumulation) in enumerate(PRODUCT):
        mask: Mask = "uneven" if world == 1 or (number + number // 4) % 2 else "rank"
        case = Case(world, accumulation, mask, shard, sep, ep, overlap=overlap, precision="fp64", **KINDS[kind])
        more: dict[str, Any] = {"small_buckets": number % 2 == 0, "kv_heads": 1 + number // 2 % 2}
        _assert_parity(ranks, dataclasses.replace(case, **more), tmp_path / str(number))


@pytest.mark.parametrize(("world", "sep", "ep"), [(1, 1, 1), (2, 1, 2), (4, 2, 2)])
def test_experts_in_fp32(ranks: Pools, tmp_path: Path, world: int, sep: int, ep: int) -> None:
    """The grouped product, which fp64 does not take. With this seed no two experts are a near tie for any token."""
    _assert_parity(ranks, Case(world, 2, "uneven", True, sep, ep, **KINDS["softmax"]), tmp_path)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("world", "sep", "ep"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (4, 1, 4), (4, 2, 2), (4, 4, 1)])
@pytest.mark.sample(4)
def test_padding_is_no_token_and_few_labels_change_no_balance(
    ranks: Pools, tmp_path: Path, world: int, sep: int, ep: int, kind: str
) -> None:
    """Against a process that never sees the padding. Rows have one token up to all, and from no target to six."""
    place = LAYOUTS.index((world, sep, ep))
    for number, mask in enumerate[Mask](("few", "none")):
        shard, overlap, accumulation = PAIRS[(place + number) % 4]
        case = Case(world, accumulation, mask, shard, sep, ep, overlap=overlap, padded=True, **KINDS[kind])
        _assert_parity(ranks, dataclasses.replace(case, precision="fp64"), tmp_path / mask)


@pytest.mark.parametrize("case", [
    Case(2, 2, "few", sep=2, ep=2, experts=EXPERTS, precision="fp64"),
    Case(2, 1, "all", experts=EXPERTS, precision="fp64"),
], ids=["few", "none at all"])  # fmt: skip
def test_routers_losses_are_means_over_tokens_however_few_labels(ranks: Pools, tmp_path: Path, case: Case) -> None:
    _assert_parity(ranks, case, tmp_path)


# Muon.


MUON_LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 1, 1), (4, 2, 2), (4, 1, 4), (4, 4, 2)]


@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
@pytest.mark.parametrize(("world", "sep", "ep"), MUON_LAYOUTS)
@pytest.mark.sample(5)
def test_muon(ranks: Pools, tmp_path: Path, world: int, sep: int, ep: int, optimizer: Any) -> None:
    """Sharded by whole tensors is not sharded is one process; experts each by themselves."""
    recipe = dataclasses.replace(CLIPPED, optimizer=optimizer, max_lr=0.01)
    kind = KINDS["softmax"] if ep > 1 or world == 1 else {}
    for shard in (True, False):
        case = Case(world, 2, "uneven", shard, sep, ep, precision="fp64", recipe=recipe, **kind, small_buckets=shard)
        _assert_parity(ranks, case, tmp_path / str(shard))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize(("world", "sep", "ep"), LAYOUTS)
def test_the_matrix_of_muon(ranks: Pools, tmp_path: Path, world: int, sep: int, ep: int, kind: str | None) -> None:
    kinds = KINDS.get(kind or "", {})
    for number, (shard, overlap, accumulation) in enumerate(PAIRS):
        recipe = dataclasses.replace(CLIPPED, optimizer="normuon" if number % 2 else "muon", max_lr=0.01)
        case = Case(world, accumulation, "uneven", shard, sep, ep, overlap=overlap, precision="fp64", recipe=recipe)
        _assert_parity(ranks, dataclasses.replace(case, small_buckets=number < 2, **kinds), tmp_path / str(number))
