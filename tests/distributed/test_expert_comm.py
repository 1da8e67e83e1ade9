"""P5: dispatch and combine over ranks, whatever the router chose: identity, gradients, no hang."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.expert_rows import combine, dispatch
from tests.helpers.ranks import Ranks
from tinytron.distributed.expert_parallel.comm import plan_dispatch

Pools = Callable[[int], Ranks]
E, D = 8, 5


def _choices(kind: str, rank: int, top_k: int) -> torch.Tensor:
    """``[T, k]``: distinct experts per token, as a router gives them; T differs per rank."""
    random = torch.Generator().manual_seed(10 * rank + top_k)
    tokens = {"no tokens here": 0 if rank == 1 else 7, "no tokens at all": 0}.get(kind, 6 + rank)
    scores = torch.rand(tokens, E, generator=random)
    if kind == "skew":
        scores[:, 5] += 0.7
    elif kind == "idle expert":
        scores[:, 3] = -1
    elif kind == "idle rank":  # the experts of the last rank of two or four
        scores[:, E // 2 :] -= 2
    elif kind == "all to one":
        scores[:, 6] += 2
    elif kind == "in order":
        scores -= torch.arange(E)
    return scores.topk(top_k, dim=1).indices


KINDS = ["even", "skew", "idle expert", "idle rank", "all to one", "in order", "no tokens here", "no tokens at all"]


def _expert(rows: torch.Tensor, expert: int | torch.Tensor) -> torch.Tensor:
    """What expert ``expert`` does to a row, so that a row at the wrong one shows: not linear, with the row's own slope."""
    return rows * (expert + 1) + rows.square() / (expert + 2)


def _there_and_back(kind: str, top_k: int, grouped: bool) -> dict[str, Any]:
    """Against the sum over choices without moving anything; rows at their expert, and all gradients."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if grouped else None
    parts, part = (world, rank) if grouped else (1, 0)
    expert_Tk = _choices(kind, rank, top_k)
    random = torch.Generator().manual_seed(rank)
    T = len(expert_Tk)
    x = torch.randn(T, D, generator=random, dtype=torch.float64).requires_grad_()
    weight = torch.rand(T, top_k, generator=random, dtype=torch.float64).requires_grad_()
    routes = plan_dispatch(expert_Tk, E, group)
    assert sum(routes.send) == T * top_k
    assert sum(routes.recv) == sum(routes.counts) == int(routes.rows_e.sum())
    rows = dispatch(x, routes, group)
    mine = torch.arange(E // parts) + part * (E // parts)
    expert_Q = mine.repeat_interleave(routes.rows_e)[:, None]
    out = combine(_expert(rows, expert_Q), weight, routes, group)

    x2, weight2 = (t.detach().clone().requires_grad_() for t in (x, weight))
    expected = (torch.stack([_expert(x2, expert_Tk[:, i : i + 1]) * weight2[:, i : i + 1] for i in range(top_k)])).sum(
        0
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    coefficient = torch.randn(T, D, generator=random, dtype=torch.float64)
    (out * coefficient).sum().backward()
    (expected * coefficient).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, weight2.grad, rtol=1e-12, atol=1e-12)

    back = combine(dispatch(x.detach(), routes, group), torch.full_like(weight, 1.0 / top_k), routes, group)
    torch.testing.assert_close(back, x.detach(), rtol=1e-14, atol=1e-14)
    counts = torch.stack([(expert_Tk == e).sum() for e in range(E)])
    return {"chosen": counts.numpy(), "served": dict(zip(mine.tolist(), routes.counts, strict=True))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_reach_their_expert_and_come_back(ranks: Pools, world: int, kind: str) -> None:
    for top_k, grouped in itertools.product((1, 2, 5), (True, False)):
        found = ranks(world).run(_there_and_back, kind, top_k, grouped, timeout=30)
        if grouped:
            served = {e: count for result in found for e, count in result["served"].items()}
            assert [served[e] for e in range(E)] == list(sum(result["chosen"] for result in found))
            if kind == "idle expert":
                assert served[3] == 0
            if kind == "all to one" and top_k == 1:
                assert [count for e, count in served.items() if e != 6] == [0] * (E - 1)


def _rows_of_one_expert() -> list[list[float]]:
    """On every rank: by rank they come from, then in token order, whatever the timing."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.tensor([[100.0 * rank + t] for t in range(4)])
    expert_Tk = torch.tensor([[1], [0], [1], [0]]) if world == 2 else torch.tensor([[t] for t in (3, 0, 3, 1)])
    rows = dispatch(x, plan_dispatch(expert_Tk, world, dist.group.WORLD), dist.group.WORLD)
    return rows.tolist()


def test_an_experts_rows_are_in_the_order_of_ranks_and_tokens(ranks: Pools) -> None:
    assert ranks(2).run(_rows_of_one_expert) == [[[1], [3], [101], [103]], [[0], [2], [100], [102]]]
    idle: list[list[float]] = []
    last = [[100.0 * rank + t] for rank in range(4) for t in (0, 2)]
    first, second = ([[100.0 * rank + t] for rank in range(4)] for t in (1, 3))
    assert ranks(4).run(_rows_of_one_expert) == [first, second, idle, last]


def _bf16_sums_in_fp32() -> list[float]:
    """Weights are fp32: 1 + 2^-9 + 2^-9 would stay 1 if the products were added in bf16."""
    x = torch.ones(3, D, dtype=torch.bfloat16)
    expert_Tk = torch.tensor([[0, 3, 5]] * 3)
    routes = plan_dispatch(expert_Tk, E, dist.group.WORLD)
    weight = torch.tensor([[1.0, 2.0**-8, 2.0**-8]] * 3)
    out = combine(dispatch(x, routes, dist.group.WORLD), weight, routes, dist.group.WORLD)
    assert out.dtype == torch.bfloat16
    x.requires_grad_()
    rows = dispatch(x, routes, dist.group.WORLD)
    rows.backward(torch.full_like(rows, 1.0).index_fill(0, torch.arange(len(rows)), 1.0))
    assert x.grad is not None
    assert x.grad.tolist() == [[3.0] * D] * 3
    return out[:, 0].tolist()


def test_the_weighted_sum_is_in_fp32(ranks: Pools) -> None:
    assert ranks(2).run(_bf16_sums_in_fp32) == [[1 + 2.0**-7] * 3] * 2
