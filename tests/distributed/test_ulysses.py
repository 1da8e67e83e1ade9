"""P7: the exchange between sequence parts and heads, and attention through it against one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks
from tests.helpers.rope import frequencies
from tinytron.distributed import ParallelLayout, ParallelState
from tinytron.distributed.sequence_parallel.ulysses import (
    HeadPlan,
    cut_sequence,
    head_to_seq,
    seq_to_head,
    sum_gradients,
)
from tinytron.kernels.choice import Kernels
from tinytron.model import ModelConfig
from tinytron.model.modules.attn import Attention
from tinytron.model.modules.emb import RotaryEmbedding
from tinytron.utils.sequences import Documents

Pools = Callable[[int], Ranks]
B, S, H = 3, 16, 4
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (4, 4), (4, 2), (4, 1)]  # query, key/value: MHA, GQA, fewer than ranks


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _exchange(heads: int, kv_heads: int) -> None:
    """There: whole sequences of the plan's heads, bit for bit. Back: the identity. Backward: the adjoint."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group, plan = dist.group.WORLD, HeadPlan(heads, kv_heads, world)
    assert group is not None
    whole = _random(B, S, heads + 2 * kv_heads, H)
    mine = cut_sequence(whole, rank, world).requires_grad_()
    there = seq_to_head(mine, plan, group)
    first, kv = rank * heads // world, rank * kv_heads // world
    wanted = [*range(first, first + plan.heads)]
    wanted += [n + head for n in (heads, heads + kv_heads) for head in range(kv, kv + plan.kv_heads)]
    assert torch.equal(there, whole[:, :, wanted])
    back = head_to_seq(there[:, :, : plan.heads], plan, group)
    assert torch.equal(back, mine[:, :, :heads])

    weight = _random(*there.shape, seed=1 + rank)
    there.backward(weight)
    weights = [torch.empty_like(weight) for _ in range(world)]
    dist.all_gather(weights, weight)
    expected = torch.zeros_like(whole)
    for r, part in enumerate(weights):  # a head that several ranks have gets the sum of what they give it
        first, kv = r * heads // world, r * kv_heads // world
        index = [*range(first, first + plan.heads)]
        index += [n + head for n in (heads, heads + kv_heads) for head in range(kv, kv + plan.kv_heads)]
        expected.index_add_(2, torch.tensor(index), part)
    torch.testing.assert_close(mine.grad, cut_sequence(expected, rank, world), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_exchange_and_its_inverse(ranks: Pools, world: int, heads: int, kv_heads: int) -> None:
    ranks(world).run(_exchange, heads, kv_heads)


def _documents(kind: str) -> Documents | None:
    """Boundaries in the flattened batch [B * S]: inside a rank's part, at its edge, and documents of one token."""
    if kind == "none":
        return None
    cuts = [0, 1, 5, 16, 24, 32, 35, 44, 48] if kind == "many" else [0, 16, 32, 48]
    longest = max(b - a for a, b in itertools.pairwise(cuts))
    return Documents(torch.tensor(cuts, dtype=torch.int32), longest)


def _attention(heads: int, kv_heads: int, kind: str, backend: Any, qk_norm: bool) -> None:
    """Outputs, and the gradients of inputs and of all weights (dQ, dK, dV are in those of qkv_proj)."""
    world = dist.get_world_size()
    config = ModelConfig(
        hidden_size=8,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=H,
        block_size=S,
        qk_norm=qk_norm,
    )
    state = ParallelState.create(ParallelLayout(world, sep=world), torch.device("cpu"))
    rope = RotaryEmbedding(frequencies(H, 10000.0), S, torch.float64)
    modules = []
    for its in (state, None):
        module = Attention(config, Kernels(attention=backend), its).double()
        for i, weight in enumerate(module.parameters()):
            weight.data = 0.5 * _random(*weight.shape, seed=10 + i)
        modules.append(module)
    x, weight = _random(B, S, 8), _random(B, S, 8, seed=1)
    whole = x.clone().requires_grad_()
    expected = modules[1](whole, rope(0, S), _documents(kind))
    (expected * weight).sum().backward()
    part = cut_sequence(x, state.rank, world).requires_grad_()
    out = modules[0](part, rope(state.rank * S // world, S // world), _documents(kind))
    (out * cut_sequence(weight, state.rank, world)).sum().backward()
    tolerance = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(out, cut_sequence(expected, state.rank, world), **tolerance)
    assert whole.grad is not None
    torch.testing.assert_close(part.grad, cut_sequence(whole.grad, state.rank, world), **tolerance)
    for mine, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert mine.grad is not None
        dist.all_reduce(mine.grad)
        torch.testing.assert_close(mine.grad, theirs.grad, **tolerance)
    if kind == "many":  # or the boundaries would not have been tested
        assert not torch.allclose(expected, modules[1](whole, rope(0, S), None))


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("kind", ["none", "many"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_attention_is_that_of_one_process(ranks: Pools, world: int, heads: int, kv_heads: int, kind: str) -> None:
    for backend, qk_norm in (("sdpa", False), ("math", True)):
        ranks(world).run(_attention, heads, kv_heads, kind, backend, qk_norm)


def _fp32(kv_heads: int) -> None:
    torch.set_default_dtype(torch.float32)
    world = dist.get_world_size()
    config = ModelConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=H, block_size=S)
    state = ParallelState.create(ParallelLayout(world, sep=world), torch.device("cpu"))
    rope = RotaryEmbedding(frequencies(H, 10000.0), S, torch.float32)
    one, many = Attention(config), Attention(config, Kernels(attention="sdpa"), state)
    for i, (a, b) in enumerate(zip(one.parameters(), many.parameters(), strict=True)):
        a.data = 0.5 * _random(*a.shape, seed=i).float()
        b.data = a.data.clone()
    x = _random(B, S, 8).float()
    expected = cut_sequence(one(x, rope(0, S)), state.rank, world)
    out = many(cut_sequence(x, state.rank, world), rope(state.rank * S // world, S // world))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("world", [2, 4])
def test_attention_in_fp32(ranks: Pools, world: int, kv_heads: int) -> None:
    ranks(world).run(_fp32, kv_heads)


def _steps_of_a_plain_optimizer(dtype: torch.dtype, bucket_size_mb: float) -> None:
    """SGD without ``DistributedOptimizer`` on parts of the sequence, and on whole sequences in one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    x = _random(B, S, 8)
    nets = []
    for share in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4, bias=False))
        net = net.to(dtype)
        net.frozen, net.unused = (torch.nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
        net.frozen.requires_grad_(False)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(2):
            part = cut_sequence(x, rank, world) if share else x
            for row in part:  # micro-batches
                net(row.to(dtype)).square().sum().backward()
            if share:
                sum_gradients(net.parameters(), group, bucket_size_mb)
            optimizer.step()
            optimizer.zero_grad()
        nets.append(net)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    for one, shared in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(shared, one, **tolerance)


@pytest.mark.parametrize("bucket_size_mb", [1e-4, 64.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_summed_gradients_train_as_one_process(
    ranks: Pools, world: int, dtype: torch.dtype, bucket_size_mb: float
) -> None:
    ranks(world).run(_steps_of_a_plain_optimizer, dtype, bucket_size_mb)


def _a_gradient_of_one_rank() -> None:
    """A parameter that one rank alone used: the others' missing gradients are zeros, in every precision of the model."""
    group = dist.group.WORLD
    assert group is not None
    params = [torch.nn.Parameter(torch.zeros(5, dtype=t)) for t in (torch.float32, torch.bfloat16, torch.float64)]
    if dist.get_rank() == 1:
        for param in params:
            param.grad = torch.full_like(param, 3.0)
    sum_gradients(params, group)
    for param in params:
        assert param.grad is not None
        assert param.grad.dtype == param.dtype
        assert param.grad.tolist() == [3.0] * 5


def test_a_missing_gradient_counts_as_zero(ranks: Pools) -> None:
    ranks(2).run(_a_gradient_of_one_rank)
