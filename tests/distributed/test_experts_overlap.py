"""The experts' exchange: what hides it, how often it is made, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks
from tinytron.distributed import ParallelLayout, ParallelState
from tinytron.distributed.exchange import Exchange
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.mlp import SwiGLU
from tinytron.model.modules.moe import Experts

Pools = Callable[[int], Ranks]
SIZES: dict[str, Any] = {
    "block_size": 16, "vocab_size": 32, "num_layer": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 16, "use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "num_shared_experts": 1,
}  # fmt: skip


def _model(recompute: Any, sep: int, ep: int) -> GPT:
    layout = ParallelLayout(dist.get_world_size(), sep, ep)
    return GPT(
        ModelConfig(**SIZES), recompute=recompute, state=ParallelState.create(layout, torch.device("cpu"))
    ).train()


def _step(model: GPT, sep: int) -> None:
    ids = torch.randint(32, (2, 16 // sep), generator=torch.Generator().manual_seed(dist.get_rank()))
    sums: Any = model(ids, ids)
    sums.objective.backward()


def _events(recompute: Any) -> list[str]:
    """What happens in one layer, in order; ``(`` and ``)`` start and end an exchange that work may hide."""
    events: list[str] = []
    real_start, real_wait = Exchange.start_exchange, Exchange.wait

    def start(*args: Any) -> torch.Tensor:
        events.append("(")
        return real_start(*args)

    def wait(exchange: Exchange) -> None:
        events.append(")")
        real_wait(exchange)

    def watch(module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(lambda *_: events.append(name))
        module.register_full_backward_hook(lambda *_: events.append(f"{name}'"))

    model = _model(recompute, 1, 2)
    layer = model.moe_layers[1]
    for module in layer.modules():
        if isinstance(module, (SwiGLU, Experts)):
            watch(module, "shared" if isinstance(module, SwiGLU) else "experts")
    Exchange.start_exchange, Exchange.wait = start, wait  # type: ignore[method-assign]
    try:
        _step(model, 1)
    finally:
        Exchange.start_exchange, Exchange.wait = real_start, real_wait  # type: ignore[method-assign]
    return events


THERE, BACK = ["(", "shared", ")", "experts"], ["experts'", "(", "shared'", ")"]


def test_the_shared_expert_hides_the_exchange_both_ways(ranks: Pools) -> None:
    other = ["(", ")"]  # the first layer, which is not watched
    for events in ranks(2).run(_events, "none"):
        assert events == other + THERE + BACK + other
    for events in ranks(2).run(_events, "full"):
        assert [e for e in events if e in "()"] == ["(", ")"] * 2 * 3
        assert [e for e in events if e not in "()"] == ["shared", "experts"] * 2 + ["experts'", "shared'"]


def _exchanges(recompute: Any, sep: int, ep: int) -> tuple[int, int]:
    """Of rows, and of counts, in a forward and a backward pass."""
    calls: list[torch.dtype] = []
    real = dist.all_to_all_single

    def counted(out: torch.Tensor, *args: Any, **options: Any) -> Any:
        calls.append(out.dtype)
        return real(out, *args, **options)

    dist.all_to_all_single = counted
    try:
        _step(_model(recompute, sep, ep), sep)
    finally:
        dist.all_to_all_single = real
    return sum(dtype.is_floating_point for dtype in calls), sum(not dtype.is_floating_point for dtype in calls)


@pytest.mark.parametrize(
    ("sep", "ep", "rows"),
    [(1, 2, 4), (2, 1, 4), (2, 2, 8)],  # per layer: there and back, forward and backward
)
def test_selective_recomputation_exchanges_nothing_twice(ranks: Pools, sep: int, ep: int, rows: int) -> None:
    counts = 2 if ep == 2 else 0
    for how in ("none", "selective"):
        assert ranks(2).run(_exchanges, how, sep, ep) == [(2 * rows, counts)] * 2
    for found, counted in ranks(2).run(_exchanges, "full", sep, ep):
        assert found == 3 * rows  # every way of the forward pass once more
        assert counted == counts
