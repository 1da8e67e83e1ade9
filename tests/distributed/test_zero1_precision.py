"""Numbers that are too large or too small: P13 (non-finite gradients), fp16 loss scaling, bf16 main weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from tests.distributed.test_zero1 import SMALL, Net, coefficients, sgd, summed_coefficients
from tests.helpers.ranks import Ranks
from tinytron.distributed import DistributedOptimizer

Pools = Callable[[int], Ranks]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused_adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "plain_adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False),
    "fused_sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, fused=True),
    "plain_sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, foreach=False),
}


def _states(optimizer: DistributedOptimizer) -> list[torch.Tensor]:
    shards = [shard for buffer in optimizer.buffers for shard in buffer.shards]
    states = [optimizer.inner.state[shard] for shard in shards]
    return [s.data for s in shards] + [v.float() for s in states for v in s.values() if torch.is_tensor(v)]


# P13


def _train(kind: str, shard: bool, losses: list[Callable[[torch.Tensor], torch.Tensor]]) -> dict[str, Any]:
    """One step per entry, which the last rank's loss goes through."""
    net, rank, world = Net(), dist.get_rank(), dist.get_world_size()
    optimizer = DistributedOptimizer(OPTIMIZERS[kind](net.parameters()), shard=shard, bucket_size_mb=SMALL)
    norms = []
    for step, spoil in enumerate(losses):
        for i in (0, 1):
            with optimizer.accumulate(last=i == 1):
                loss = net(coefficients(rank, micro_batch=2 * step + i))
                (spoil(loss) if rank == world - 1 and i == 0 else loss).backward()
        norms.append(float(optimizer.step(max_norm=1.0)))
        optimizer.zero_grad()
    return {
        "weights": [p.detach().numpy() for p in net.parameters()],
        "states": [s.numpy() for s in _states(optimizer)],
        "skipped": float(optimizer.skipped_steps),
        "norms": norms,
    }


def _same(loss: torch.Tensor) -> torch.Tensor:
    return loss


def _nan(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def _inf(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("inf")


@pytest.mark.parametrize("shard", [True, False], ids=["shard", "replicate"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(
    ranks: Pools, world: int, kind: str, shard: bool
) -> None:
    bad = ranks(world).run(_train, kind, shard, [_same, _nan, _inf])
    good = ranks(world).run(_train, kind, shard, [_same])
    for mine, theirs in zip(bad, good, strict=True):
        assert mine["skipped"] == 2
        assert theirs["skipped"] == 0
        assert [x == x and abs(x) < float("inf") for x in mine["norms"]] == [True, False, False]
        for what in ("weights", "states"):
            assert len(mine[what]) == len(theirs[what])
            for a, b in zip(mine[what], theirs[what], strict=True):
                assert (a == b).all(), f"{what} changed in a skipped step"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_after_a_skipped_step(ranks: Pools, kind: str) -> None:
    first, second = ranks(2).run(_train, kind, True, [_nan, _same, _same])
    assert first["skipped"] == second["skipped"] == 1
    for a, b, start in zip(first["weights"], second["weights"], Net().parameters(), strict=True):
        assert (a == b).all()
        assert (a != start.detach().numpy()).mean() > 0.9


# fp16


def _loss_scale() -> None:
    net = Net(torch.float16)
    before = [p.detach().float() for p in net.parameters()]
    optimizer = DistributedOptimizer(sgd(net, lr=2.0**-10), loss_scaling=True, bucket_size_mb=SMALL)
    assert float(optimizer.loss_scale) == 65536.0
    world, scales = dist.get_world_size(), []
    total = summed_coefficients(world)
    norm = torch.cat([t.flatten() for t in total]).norm()
    for step in range(4):
        with optimizer.accumulate(last=True):
            loss = net(coefficients(dist.get_rank()))  # gradients up to 5 * 65536: too much for fp16
            optimizer.scale(loss).backward()
        found = optimizer.step()
        optimizer.zero_grad()
        scales.append(float(optimizer.loss_scale))
        if not torch.isfinite(found):
            assert step < 3, "the scale went down too slowly"
            continue
        torch.testing.assert_close(found, norm)  # of the unscaled gradients
        for piece in optimizer.pieces():
            assert piece.main.dtype == torch.float32
    assert scales == [32768.0, 16384.0, 8192.0, 8192.0]
    assert float(optimizer.skipped_steps) == 3
    for p, start, t in zip(net.parameters(), before, total, strict=True):
        torch.testing.assert_close(p.detach(), (start - 2.0**-10 * t).half(), rtol=0, atol=0)


@pytest.mark.parametrize("world", [1, 2])
def test_fp16_halves_the_scale_after_overflow_and_unscales_the_gradients(ranks: Pools, world: int) -> None:
    ranks(world).run(_loss_scale)


def _scale_grows() -> list[float]:
    net = Net(torch.float16)
    optimizer = DistributedOptimizer(sgd(net, lr=0.0), loss_scaling=True)
    scales = []
    for _ in range(2001):
        (next(iter(net.parameters())).float().sum() * 2.0**-10 * optimizer.loss_scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        scales.append(float(optimizer.loss_scale))
    return scales


def test_fp16_doubles_the_scale_after_2000_good_steps(ranks: Pools) -> None:
    (scales,) = ranks(1).run(_scale_grows)
    assert scales == [65536.0] * 1999 + [131072.0] * 2


def _tiny_gradients(scaling: bool) -> float:
    net = nn.Linear(1, 1, bias=False, dtype=torch.float16)
    optimizer = DistributedOptimizer(sgd(net), loss_scaling=scaling)
    with optimizer.accumulate(last=True):
        out = net(torch.full((1, 1), 1e-4, dtype=torch.float16)).float().sum()
        optimizer.scale(out * 1e-4).backward()  # the gradient, 1e-8, is below what fp16 can hold
    return float(optimizer.step())


def test_fp16_scaling_keeps_gradients_that_would_vanish(ranks: Pools) -> None:
    assert ranks(1).run(_tiny_gradients, False) == [0.0]
    assert ranks(1).run(_tiny_gradients, True)[0] == pytest.approx(1e-8, rel=0.01)


# bf16


def _tiny_updates(shard: bool) -> tuple[float, float]:
    net = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(net.weight)
    optimizer = DistributedOptimizer(sgd(net, lr=1e-4), shard=shard)
    for _ in range(100):  # each update is far below the 2^-8 that a bf16 one can change by
        with optimizer.accumulate(last=True):
            (net.weight.float().sum() / dist.get_world_size()).backward()
        optimizer.step()
        optimizer.zero_grad()
    mains = torch.cat([piece.main for piece in optimizer.pieces()] or [torch.full((1,), 0.99)])
    assert mains.dtype == torch.float32
    assert net.weight.dtype == torch.bfloat16
    return float(mains.mean()), float(net.weight.detach().float().mean())


@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_bf16_updates_too_small_for_bf16_add_up_in_the_main_weights(ranks: Pools, world: int, shard: bool) -> None:
    for main, weight in ranks(world).run(_tiny_updates, shard):
        assert main == pytest.approx(0.99, abs=1e-5)
        assert weight == pytest.approx(0.99, abs=2**-8)
        assert weight < 1.0


def _small_gradients_beside_large(shard: bool, view: bool) -> None:
    """Micro-batch 0 of rank 0 gives 1, everybody else 2^-10: a bf16 sum would stay at 1."""
    rank, world, micro_batches = dist.get_rank(), dist.get_world_size(), 4
    net = nn.Linear(8, 300, bias=False, dtype=torch.bfloat16)
    optimizer = DistributedOptimizer(sgd(net, lr=0.0), shard=shard, grad_as_view=view)
    for i in range(micro_batches):
        with optimizer.accumulate(last=i == micro_batches - 1):
            (net.weight.float() * (1.0 if rank == i == 0 else 2.0**-10)).sum().backward()
    norm = optimizer.step()
    assert net.weight.grad is not None
    assert net.weight.grad.dtype == torch.float32
    expected = 1.0 + (micro_batches * world - 1) * 2.0**-10
    for piece in optimizer.pieces():
        assert piece.holder.grad is not None
        assert (piece.holder.grad[piece.start : piece.start + len(piece.main)] == expected).all()
    torch.testing.assert_close(norm, torch.tensor(expected * 2400**0.5))


@pytest.mark.parametrize("view", [True, False])
@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_bf16_gradients_are_accumulated_and_reduced_in_fp32(ranks: Pools, world: int, shard: bool, view: bool) -> None:
    ranks(world).run(_small_gradients_beside_large, shard, view)


def _written_from_outside(shard: bool) -> None:
    """The main weights follow what somebody (a checkpoint) wrote into the parameters."""
    net = nn.Linear(8, 300, bias=False, dtype=torch.bfloat16)
    optimizer = DistributedOptimizer(sgd(net, lr=0.0), shard=shard)
    assert optimizer.buffers
    with torch.no_grad():
        net.weight.fill_(0.5)
    optimizer.refresh_shards()
    with optimizer.accumulate(last=True):
        net.weight.float().sum().backward()
    optimizer.step()
    assert (net.weight == 0.5).all()


@pytest.mark.parametrize("shard", [True, False])
def test_parameters_written_from_outside_are_kept(ranks: Pools, shard: bool) -> None:
    ranks(2).run(_written_from_outside, shard)
