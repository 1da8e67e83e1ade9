"""Hashes of bits, and replicas that are no longer the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of
from tinytron.distributed import DistributedOptimizer, ParallelLayout, ParallelState, replicas
from tinytron.distributed.param_spec import specs_of
from tinytron.distributed.replicas import check_replicas, hash_bits, minority
from tinytron.errors import TinytronError
from tinytron.model import GPT

Pools = Callable[[int], Ranks]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [7, 2**22])
def test_every_bit_and_every_place_counts(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int) -> None:
    monkeypatch.setattr(replicas, "_CHUNK", chunk)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    flat = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat[4] = torch.nan
    hashes = {int(hash_bits(flat))}
    bits = [1 << bit for bit in range(8 * dtype.itemsize - 1)] + [torch.iinfo(integer).min]
    for i in range(len(flat)):
        for bit in bits:
            other = flat.clone()
            other.view(integer)[i] ^= bit
            hashes.add(int(hash_bits(other)))
        for j in range(i):
            other = flat.clone()
            other[i], other[j] = flat[j], flat[i]
            hashes.add(int(hash_bits(other)))
            other = flat.clone()
            other.view(integer)[[i, j]] ^= bits[-1]
            hashes.add(int(hash_bits(other)))
    assert len(hashes) == 1 + len(flat) * len(bits) + 16 * 15
    assert int(hash_bits(flat.clone())) in hashes
    assert hash_bits(flat.to("meta")).device.type == "meta"  # no value was asked for: the host did not wait
    assert int(hash_bits(torch.tensor([0.0]))) != int(hash_bits(torch.tensor([-0.0])))


@pytest.mark.parametrize(
    ("group", "hashes", "says"),
    [
        ([0, 1, 2, 3], [7, 7, 8, 7], "rank 2 differs from the majority"),
        ([1, 3, 5], [9, 7, 7], "rank 1 differs from the majority"),
        ([0, 1, 2, 3, 4], [7, 8, 7, 9, 7], "ranks 1, 3 differ from the majority"),
        ([0, 1], [7, 8], "there is no majority among ranks 0 | 1"),
        ([0, 1, 2, 3], [7, 8, 8, 7], "there is no majority among ranks 0, 3 | 1, 2"),
    ],
)
def test_the_majority_is_right(group: list[int], hashes: list[int], says: str) -> None:
    assert minority(group, hashes) == says


def _damage(name: str, rank: int, dtype: torch.dtype, ep: int, fill: float | None) -> str:
    """What is said after one element of ``name`` changed on ``rank``; ``fill`` writes the same to all ranks."""
    flags = ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2) if ep else ()
    config = config_of(*TINY, *flags)
    state = ParallelState.create(ParallelLayout(4, ep=ep or 1), torch.device("cpu"))
    model = GPT(config.model, seed=1, state=state).to(dtype)
    optimizer = DistributedOptimizer(torch.optim.AdamW(model.parameters(), fused=True))
    optimizer.attach(model, specs_of(model), state)
    flat = dict(model.named_parameters())[name].data.view(-1)
    if fill is not None:
        flat[3] = fill
    if state.rank == rank:
        flat[5] = flat[5] * (1 + 2**-7)
    try:
        check_replicas(12, optimizer, state)
    except TinytronError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ep", [0, 2])
def test_equal_replicas_are_silent(ranks: Pools, dtype: torch.dtype, ep: int) -> None:
    """With two ranks to an expert group, experts are not the same on all ranks, and need not be."""
    assert ranks(4).run(_damage, "wte.weight", 99, dtype, ep, float("nan")) == [""] * 4


@pytest.mark.parametrize(
    ("name", "rank", "ep", "says"),
    [
        ("wte.weight", 2, 0, "dense parameters (first: wte.weight): rank 2 differs from the majority"),
        ("wte.weight", 0, 2, "dense parameters (first: wte.weight): rank 0 differs from the majority"),
        (
            "blocks.1.mlp.experts.down_proj",
            1,
            1,
            "expert parameters (first: blocks.1.mlp.experts.down_proj): rank 1 differs from the majority",
        ),
        (
            "blocks.1.mlp.experts.down_proj",
            1,
            2,
            "expert parameters (first: blocks.1.mlp.experts.down_proj): there is no majority among ranks 1 | 3",
        ),
    ],
)
def test_a_changed_element_is_told_on_every_rank(ranks: Pools, name: str, rank: int, ep: int, says: str) -> None:
    for dtype in DTYPES:
        said = ranks(4).run(_damage, name, rank, dtype, ep, None)
        assert set(said) == {said[0]}
        assert said[0].startswith(f"TrainingError: step 12: the replicas diverged in their {says}; ")
