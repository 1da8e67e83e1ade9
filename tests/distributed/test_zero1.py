"""The optimizer wrapper by itself: sums in closed form (P3), one norm (P4), and what user code may do to it."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from tests.helpers.ranks import Ranks
from tinytron.distributed import DistributedOptimizer, ParallelLayout, ParallelState, ParamSpec
from tinytron.distributed.param_spec import Shard, specs_of
from tinytron.distributed.sharding import whole_shape
from tinytron.errors import ConfigError

Pools = Callable[[int], Ranks]
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])
SMALL = 600 * 4 / 2**20  # MiB of 600 fp32 elements: a bucket or two for every tensor of Net
VARIANTS = list(itertools.product((True, False), (True, False), (SMALL, 64.0)))  # shard, grad_as_view, bucket_size_mb


class Net(nn.Module):
    """Tensors of awkward sizes, one of them used twice."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        for name, shape in {"first": (37, 29), "shared": (1000,), "third": (7, 11, 13), "last": (1,)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=random).to(dtype)))

    def forward(self, coefficients: Sequence[torch.Tensor]) -> torch.Tensor:
        """A loss whose gradients are ``coefficients``; half of the second one's comes from each of two uses."""
        first, shared, third, last = (p.float() for p in self.parameters())
        a, b, c, d = coefficients
        return (
            (first * a).sum() + (shared * b / 2).sum() + (third * c).sum() + (last * d).sum() + (shared * b / 2).sum()
        )


def coefficients(rank: int, micro_batch: int = 0) -> list[torch.Tensor]:
    """Gradients of one rank and micro-batch: multiples of 1/8, so that every sum of them is exact."""
    random = torch.Generator().manual_seed(100 * rank + micro_batch)
    return [torch.randint(-40, 41, p.shape, generator=random) / 8 for p in Net().parameters()]


def summed_coefficients(world: int) -> list[torch.Tensor]:
    """Sum of ``coefficients`` over the ranks."""
    return [torch.stack(ranks).sum(0) for ranks in zip(*(coefficients(r) for r in range(world)), strict=True)]


def sgd(net: nn.Module, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=lr)


def world_state() -> ParallelState:
    """All ranks, data parallel."""
    return ParallelState.create(ParallelLayout(dist.get_world_size()), torch.device("cpu"))


# P3


def _constant_gradients(shard: bool, view: bool, bucket_mb: float) -> None:
    net, (rank, world) = Net(), (dist.get_rank(), dist.get_world_size())
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = DistributedOptimizer(sgd(net), None, shard=shard, grad_as_view=view, bucket_size_mb=bucket_mb)
    micro_batches = 3
    for step in (1, 2):
        for i in range(micro_batches):
            with optimizer.accumulate(last=i == micro_batches - 1):
                net([torch.full_like(p, rank + 1.0) for p in net.parameters()]).backward()
        norm = optimizer.step()
        optimizer.zero_grad()
        total = micro_batches * world * (world + 1) / 2  # sum over ranks of rank + 1
        size = sum(p.numel() for p in net.parameters())
        torch.testing.assert_close(norm, torch.tensor(total * size**0.5))
        for p, start in zip(net.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), start - step * total, rtol=0, atol=1e-5)


@WORLDS
@pytest.mark.parametrize(("shard", "view", "bucket_mb"), VARIANTS)
def test_constant_gradients_sum_to_the_closed_form(
    ranks: Pools, world: int, shard: bool, view: bool, bucket_mb: float
) -> None:
    ranks(world).run(_constant_gradients, shard, view, bucket_mb)


def _step_without_accumulate(shard: bool) -> None:
    """A plain loop that knows nothing of ``accumulate``: everything is reduced in ``step``."""
    net, world = Net(), dist.get_world_size()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = DistributedOptimizer(sgd(net), None, shard=shard, bucket_size_mb=SMALL)
    net(coefficients(dist.get_rank())).backward()
    optimizer.step()
    for p, start, total in zip(net.parameters(), before, summed_coefficients(world), strict=True):
        torch.testing.assert_close(p.detach(), start - total, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shard", [True, False])
def test_a_loop_without_accumulate_works_too(ranks: Pools, shard: bool) -> None:
    ranks(2).run(_step_without_accumulate, shard)


# P4


def _norm_and_clip(shard: bool, bucket_mb: float) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    total = summed_coefficients(world)
    expected = torch.stack([t.double().square().sum() for t in total]).sum().sqrt().item()
    for limit in (0.0, expected * 1.0001, expected * 0.9999, expected / 3):
        net = Net()
        before = [p.detach().clone() for p in net.parameters()]
        weights, rest = list(net.parameters())[:2], list(net.parameters())[2:]
        inner = torch.optim.SGD([{"params": weights, "lr": 1.0}, {"params": rest, "lr": 2.0}], lr=0.5)
        optimizer = DistributedOptimizer(inner, None, shard=shard, bucket_size_mb=bucket_mb)
        with optimizer.accumulate(last=True):
            net(coefficients(rank)).backward()
        norm = optimizer.step(max_norm=limit)
        assert norm.item() == pytest.approx(expected, rel=1e-6)
        norms = [torch.zeros(()) for _ in range(world)]
        dist.all_gather(norms, norm)
        assert all(torch.equal(other, norm) for other in norms)
        factor = limit / (expected + 1e-6) if 0 < limit < expected else 1.0
        for p, start, t, lr in zip(net.parameters(), before, total, (1.0, 1.0, 2.0, 2.0), strict=True):
            torch.testing.assert_close(p.detach(), start - lr * factor * t, rtol=0, atol=2e-5)
            if factor == 1.0:  # gradients just below the limit are not touched at all
                assert torch.equal(p.detach(), start - lr * t)


@WORLDS
@pytest.mark.parametrize(("shard", "bucket_mb"), list(itertools.product((True, False), (SMALL, 64.0))))
def test_the_norm_is_that_of_all_parameters_once_and_clips_at_the_limit(
    ranks: Pools, world: int, shard: bool, bucket_mb: float
) -> None:
    ranks(world).run(_norm_and_clip, shard, bucket_mb)


# Ranks that disagree.


class _Branches(nn.Module):
    """Two halves of which ``order`` says which one backward reaches first; ``used`` which take part at all."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.ModuleList(nn.Linear(40, 40, bias=False) for _ in range(4))
        for i, half in enumerate(self.halves):
            nn.init.constant_(half.weight, 0.1 * (i + 1))

    def forward(self, x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        out = x
        for i in order:
            out = out + self.halves[i](x) * out.mean()
        return out.sum()


def _different_orders(shard: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    orders = [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)]
    net = _Branches()
    expected = _Branches()
    sum(expected(torch.full((2, 40), r + 1.0), orders[r]) for r in range(world)).backward()  # type: ignore[union-attr]
    optimizer = DistributedOptimizer(sgd(net, lr=1e-6), None, shard=shard, bucket_size_mb=1600 * 4 / 2**20)
    with optimizer.accumulate(last=True):
        net(torch.full((2, 40), rank + 1.0), orders[rank]).backward()
    optimizer.step()
    for mine, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine.detach(), theirs.detach() - 1e-6 * theirs.grad)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("shard", [True, False])
def test_gradients_may_come_in_another_order_on_every_rank(ranks: Pools, world: int, shard: bool) -> None:
    ranks(world).run(_different_orders, shard)


def _unused_is_an_error() -> None:
    net = _Branches()
    optimizer = DistributedOptimizer(sgd(net), None, bucket_size_mb=SMALL)
    optimizer.attach(net, specs_of(net), world_state())
    message = r"2 parameters got no gradient .*halves\.3\.weight.*--ddp_find_unused_parameters"
    with pytest.raises(ConfigError, match=message), optimizer.accumulate(last=True):
        net(torch.ones(2, 40), (0, 1)).backward()


def _unused_counts_as_zero(shard: bool, view: bool) -> None:
    rank = dist.get_rank()
    used = [(0, 1), (1, 2)][rank]  # 0 and 2 are used by one rank, 3 by none
    net, expected = _Branches(), _Branches()
    (expected(torch.ones(2, 40), (0, 1)) + expected(torch.ones(2, 40), (1, 2))).backward()
    options: dict[str, Any] = {"shard": shard, "grad_as_view": view, "bucket_size_mb": SMALL}
    optimizer = DistributedOptimizer(sgd(net, lr=1e-6), None, allow_unused=True, **options)
    with optimizer.accumulate(last=True):
        net(torch.ones(2, 40), used).backward()
    optimizer.step()
    for mine, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        grad = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(mine.detach(), theirs.detach() - 1e-6 * grad)


def test_a_parameter_without_gradient_is_an_error(ranks: Pools) -> None:
    ranks(2).run(_unused_is_an_error)


@pytest.mark.parametrize(("shard", "view"), list(itertools.product((True, False), (True, False))))
def test_a_parameter_without_gradient_counts_as_zero_if_allowed(ranks: Pools, shard: bool, view: bool) -> None:
    ranks(2).run(_unused_counts_as_zero, shard, view)


# What user code does around it.


def _attach_replaces_the_group() -> None:
    """Made with the group of this rank alone, attached to the world: gradients are summed over the world."""
    state = ParallelState.create(ParallelLayout(dist.get_world_size()), torch.device("cpu"))
    net = Net()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = DistributedOptimizer(optimizer=sgd(net), process_group=state.groups["self"])
    optimizer.attach(net, specs_of(net), state)
    assert {piece.name for piece in optimizer.pieces()} <= {"first", "shared", "third", "last"}
    with optimizer.accumulate(last=True):
        net(coefficients(state.rank)).backward()
    optimizer.step()
    for p, start, total in zip(net.parameters(), before, summed_coefficients(state.layout.world_size), strict=True):
        torch.testing.assert_close(p.detach(), start - total, rtol=0, atol=1e-5)


def test_attach_replaces_the_process_group(ranks: Pools) -> None:
    ranks(4).run(_attach_replaces_the_group)


def _attach_checks_parameters() -> None:
    net = Net()
    optimizer = DistributedOptimizer(torch.optim.SGD([net.first, net.third], lr=1.0))
    state = world_state()
    message = r"does not update 2 trainable parameters \(shared, last.*self\.raw_model\.parameters\(\)"
    with pytest.raises(ConfigError, match=message):
        optimizer.attach(net, specs_of(net), state)
    net.shared.requires_grad_(False)
    net.last.requires_grad_(False)
    optimizer.attach(net, specs_of(net), state)


def test_attach_refuses_an_optimizer_that_misses_parameters(ranks: Pools) -> None:
    ranks(1).run(_attach_checks_parameters)


def _attach_checks_shapes() -> None:
    net, state = Net(), world_state()
    cut = (Shard("dp", 0),)
    specs = [ParamSpec(s.name, s.shape, s.kind, cut if s.name == "shared" else ()) for s in specs_of(net)]
    optimizer = DistributedOptimizer(sgd(net))
    with pytest.raises(ConfigError, match=r"parameter shared has shape \[1000\].* this rank holds \[500\]"):
        optimizer.attach(net, specs, state)


def test_attach_refuses_parameters_that_are_not_what_their_specs_say(ranks: Pools) -> None:
    ranks(2).run(_attach_checks_shapes)


def _specs_decide_the_group() -> None:
    """A parameter that is cut over ``ep`` is summed only over the ranks that hold the same part of it."""
    rank, net = dist.get_rank(), Net()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    state = ParallelState.create(ParallelLayout(4, ep=2), torch.device("cpu"))
    cut = (Shard("ep", 0),)
    specs = [
        ParamSpec(s.name, whole_shape(s.shape, cut, state.layout), s.kind, cut) if s.name == "third" else s
        for s in specs_of(net)
    ]
    optimizer = DistributedOptimizer(sgd(net))
    optimizer.attach(net, specs, state)
    with optimizer.accumulate(last=True):
        net([torch.full_like(p, rank + 1.0) for p in net.parameters()]).backward()
    optimizer.step()
    for name, p in net.named_parameters():
        total = {0: 1 + 3, 1: 2 + 4}[rank % 2] if name == "third" else 1 + 2 + 3 + 4
        torch.testing.assert_close(p.detach(), before[name] - total, rtol=0, atol=1e-5)


def test_specs_decide_the_ranks_a_gradient_is_summed_over(ranks: Pools) -> None:
    ranks(4).run(_specs_decide_the_group)


def _frozen_and_identity() -> None:
    net = Net()
    net.third.requires_grad_(False)
    objects, frozen = list(net.parameters()), net.third.detach().clone()
    optimizer = DistributedOptimizer(sgd(net))
    assert all(a is b for a, b in zip(net.parameters(), objects, strict=True))
    with optimizer.accumulate(last=True):
        net(coefficients(dist.get_rank())).backward()
    optimizer.step()
    assert torch.equal(net.third, frozen)


def test_parameters_stay_the_same_objects_and_frozen_ones_as_they_are(ranks: Pools) -> None:
    ranks(2).run(_frozen_and_identity)


def _gradients_set_to_none(view: bool) -> None:
    """``model.zero_grad()`` of a plain loop removes the ``.grad`` that is a view of the buffer."""
    net, world = Net(), dist.get_world_size()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = DistributedOptimizer(sgd(net), grad_as_view=view, bucket_size_mb=SMALL)
    for step in (1, 2):
        net.zero_grad(set_to_none=True)
        with optimizer.accumulate(last=True):
            net(coefficients(dist.get_rank())).backward()
        optimizer.step()
        for p, start, total in zip(net.parameters(), before, summed_coefficients(world), strict=True):
            torch.testing.assert_close(p.detach(), start - step * total, rtol=0, atol=1e-5)
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("view", [True, False])
def test_gradients_set_to_none_by_user_code_are_not_lost(ranks: Pools, view: bool) -> None:
    ranks(2).run(_gradients_set_to_none, view)


def _is_freed() -> bool:
    """Gradient hooks live in C++, where Python's collector does not look: through them nothing may hold the optimizer."""
    net = Net()
    optimizer = DistributedOptimizer(sgd(net))
    with optimizer.accumulate(last=True):
        net(coefficients(dist.get_rank())).backward()
    optimizer.step()
    alive = weakref.ref(optimizer)
    del optimizer, net
    gc.collect()
    return alive() is None


def test_the_optimizer_is_freed_with_its_model(ranks: Pools) -> None:
    assert ranks(1).run(_is_freed) == [True]


def _bytes(dtype: torch.dtype) -> dict[str, int]:
    net = nn.Linear(256, 1024, bias=False, dtype=dtype)
    optimizer = DistributedOptimizer(torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True))
    with optimizer.accumulate(last=True):
        net(torch.ones(2, 256, dtype=dtype)).sum().backward()
    optimizer.step()
    return optimizer.bytes_per_rank()


@WORLDS
def test_states_and_main_weights_are_divided_by_the_ranks(ranks: Pools, world: int) -> None:
    count, step = 256 * 1024, 4  # Adam's step counter is one fp32 scalar
    for held in ranks(world).run(_bytes, torch.bfloat16):
        assert held == {
            "parameters": 2 * count,
            "gradients": 4 * count,
            "main": 4 * count // world,
            "optimizer": 8 * count // world + step,
        }
    for held in ranks(world).run(_bytes, torch.float32):
        assert held["main"] == 0  # fp32 parameters are their own main copy


def _rate_in_a_tensor(dtype: torch.dtype) -> None:
    """As a CUDA graph of whole steps needs it."""
    in_tensor, in_float = Net(dtype), Net(dtype)
    rate = torch.tensor(0.1)
    optimizers = [
        DistributedOptimizer(torch.optim.AdamW(in_tensor.parameters(), lr=rate, fused=True, capturable=True)),
        DistributedOptimizer(torch.optim.AdamW(in_float.parameters(), lr=0.1, fused=True)),
    ]
    for step, lr in enumerate((0.1, 0.03, 0.2)):
        rate.fill_(lr)
        for group in optimizers[1].param_groups:
            group["lr"] = lr
        for net, optimizer in zip((in_tensor, in_float), optimizers, strict=True):
            net(coefficients(dist.get_rank(), step)).backward()
            optimizer.step(max_norm=1.0)
            optimizer.zero_grad()
        torch.testing.assert_close(list(in_tensor.parameters()), list(in_float.parameters()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learning_rate_in_a_tensor_is_read_at_every_step(ranks: Pools, dtype: torch.dtype) -> None:
    ranks(2).run(_rate_in_a_tensor, dtype)
