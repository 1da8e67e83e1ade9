"""Compiled blocks under every kind of parallelism: the eager model's gradients, and no break between exchanges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.test_experts_overlap import SIZES
from tests.helpers.ranks import Ranks
from tinytron.distributed import ParallelLayout, ParallelState
from tinytron.model import GPT, ModelConfig

Pools = Callable[[int], Ranks]
S = 64  # long enough for attention by tiles
WIDER = SIZES | {"block_size": S, "hidden_size": 64, "init_std": 0.1}
DENSE = {"use_moe": False, "intermediate_size": 96}


def _compare(world: int, sep: int, ep: int, sizes: dict[str, Any], recompute: Any, dtype: torch.dtype) -> list[Any]:
    """Largest relative distance of a gradient over four steps, graph breaks, and graphs after one and all steps."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    state = ParallelState.create(ParallelLayout(world, sep, ep), torch.device("cpu"))
    config = ModelConfig(**WIDER | sizes)
    model, plain = (GPT(config, dtype=dtype, recompute=how, state=state).train() for how in (recompute, "none"))
    model.compile_blocks()
    distance, graphs = 0.0, []
    for step in range(4):
        ids = torch.randint(32, (2, S // sep), generator=torch.Generator().manual_seed(10 * step + state.rank))
        for one in (model, plain):
            one.zero_grad()
            sums: Any = one(ids, ids)
            (sums.objective / ids.numel()).backward()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            gap = (mine.grad - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-3)
            distance = max(distance, float(gap))
        graphs.append(counters["stats"]["unique_graphs"])
    return [distance, dict(counters["graph_break"]), graphs]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world", "sep", "ep", "sizes"),
    [(1, 1, 1, {}), (2, 2, 1, DENSE), (2, 2, 1, {}), (2, 2, 2, {}), (2, 1, 2, {"num_shared_experts": 0})],
    ids=["experts", "dense-sep2", "experts-sep2", "experts-sep2-ep2", "experts-ep2"],
)
def test_compiled_blocks_have_the_gradients_of_eager_ones(
    ranks: Pools, world: int, sep: int, ep: int, sizes: dict[str, Any], dtype: torch.dtype, recompute: Any
) -> None:
    """All experts are used by every token, so that rounding cannot change a choice."""
    sizes = sizes if sizes == DENSE else sizes | {"num_experts_per_tok": SIZES["num_experts"]}
    for distance, breaks, _ in ranks(world).run(_compare, world, sep, ep, sizes, recompute, dtype, timeout=240):
        assert distance < (1e-5 if dtype == torch.float32 else 0.05)
        assert not breaks


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_other_numbers_of_rows_are_not_compiled_for(ranks: Pools, recompute: Any) -> None:
    """A rank gets another number of rows in every layer and step, and an expert may get none or one."""
    for distance, breaks, graphs in ranks(2).run(_compare, 2, 1, 2, {}, recompute, torch.bfloat16, timeout=240):
        assert not breaks
        assert graphs[0] == graphs[-1] <= 6
        assert distance < 0.5  # a token near a tie may be routed otherwise than in the eager model
