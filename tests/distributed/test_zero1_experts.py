"""The optimizer wrapper with expert parameters: sums in closed form (P3), one norm (P4), non-finite gradients (P13)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from tests.distributed.test_zero1 import SMALL
from tests.helpers.parity import EXPERTS, Case, ParityTrainer, placed
from tests.helpers.ranks import Ranks
from tinytron.data import Batch
from tinytron.distributed import DistributedOptimizer, ParallelLayout, ParallelState, ParamSpec
from tinytron.distributed.param_spec import Shard
from tinytron.distributed.zero1.distributed_optimizer import Options
from tinytron.model.modules.loss import LossSums
from tinytron.optim import Muon

Pools = Callable[[int], Ranks]
NUM_EXPERTS = 4
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # world, ep
OPTIMIZERS = ["sgd", "muon"]


class Net(nn.Module):
    """One dense matrix, one vector, and this rank's part of ``NUM_EXPERTS`` experts; all ones times a number."""

    def __init__(self, local_experts: int) -> None:
        super().__init__()
        self.dense, self.vector = nn.Parameter(torch.full((23, 19), 2.0)), nn.Parameter(torch.full((301,), 3.0))
        self.experts = nn.Parameter(torch.full((local_experts, 13, 11), 4.0))

    def param_specs(self) -> list[ParamSpec]:
        """What the optimizer must know of the parameters."""
        whole = (NUM_EXPERTS, 13, 11)
        return [
            ParamSpec("dense", (23, 19), "matrix"),
            ParamSpec("vector", (301,), "norm"),
            ParamSpec("experts", whole, "matrix", (Shard("ep", 0),), stacked=True),
        ]


def _made(ep: int, options: Options, kind: str) -> tuple[Net, DistributedOptimizer, ParallelState]:
    state = ParallelState.create(ParallelLayout(dist.get_world_size(), ep=ep), torch.device("cpu"))
    net = Net(NUM_EXPERTS // ep)
    inner: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    if kind == "muon":  # what matters here is that tensors stay whole; they do not change with this rate
        groups = [{"params": [net.dense, net.experts], "kind": "muon"}, {"params": [net.vector], "kind": "adamw"}]
        inner = Muon(groups, lr=0.0)
    optimizer = DistributedOptimizer(inner, state.groups["dp"])
    optimizer.attach(net, net.param_specs(), state, options)
    return net, optimizer, state


def _sums(ep: int, options: Options, kind: str) -> tuple[float, list[tuple[str, int, int, Any]]]:
    """The gradient of every element is rank + 1 on this rank, in each of two micro-batches."""
    net, optimizer, state = _made(ep, options, kind)
    for i in range(2):
        with optimizer.accumulate(last=i == 1):
            sum((state.rank + 1) * p.sum() for p in net.parameters()).backward()  # type: ignore[union-attr]
    norm = optimizer.step()
    optimizer.finish_gather()
    owned = []
    for piece in optimizer.pieces():
        assert piece.holder.grad is not None
        own = piece.holder.grad.view(-1)[piece.start : piece.start + len(piece.main)]
        owned += [(piece.name, piece.numel, offset, part) for offset, part in placed(piece, own.numpy().copy())]
    for name, start, total in (("dense", 2.0, _dense_sum(state)), ("vector", 3.0, _dense_sum(state))):
        assert (net.get_parameter(name) == start - (total if kind == "sgd" else 0)).all()
    assert (net.experts == 4.0 - (_expert_sum(state) if kind == "sgd" else 0)).all()
    return float(norm), owned


def _dense_sum(state: ParallelState) -> float:
    return 2 * sum(r + 1 for r in range(state.layout.world_size))


def _expert_sum(state: ParallelState) -> float:
    """Ranks r, r + ep, r + 2 ep, ... hold the same experts."""
    ep = state.layout.ep
    return 2 * sum(r + 1 for r in range(state.rank % ep, state.layout.world_size, ep))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("shard", [True, False], ids=["shard", "replicate"])
@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_sums_and_norm_in_closed_form(ranks: Pools, world: int, ep: int, shard: bool, kind: str) -> None:
    for bucket_mb, overlap in itertools.product((SMALL, 64.0), (True, False)):
        options = Options(shard, bucket_mb, overlap, overlap)
        found = ranks(world).run(_sums, ep, options, kind)
        dense = 2.0 * sum(range(1, world + 1))
        expert = [2.0 * sum(range(part + 1, world + 1, ep)) for part in range(ep)]
        whole = {"dense": np.full(23 * 19, dense), "vector": np.full(301, dense)}
        whole["experts"] = np.repeat(expert, NUM_EXPERTS // ep * 13 * 11)
        square = sum((values**2).sum() for values in whole.values())  # each expert's element once
        owners = {name: np.zeros(len(values), dtype=int) for name, values in whole.items()}
        for norm, owned in found:
            assert norm == pytest.approx(square**0.5, rel=1e-6)
            for name, numel, offset, own in owned:
                assert numel == len(whole[name])
                assert (own == whole[name][offset : offset + len(own)]).all()
                owners[name][offset : offset + len(own)] += 1
        assert all((owners[name] == (1 if shard else world)).all() for name in ("dense", "vector"))
        assert (owners["experts"] == (1 if shard else world // ep)).all()


def _clipped(ep: int, shard: bool, factor: float) -> tuple[float, float]:
    """How far a dense and an expert element moved, per unit of gradient, with the limit ``factor`` times the norm."""
    net, optimizer, state = _made(ep, Options(shard), "sgd")
    dense, expert, world = _dense_sum(state), _expert_sum(state), state.layout.world_size
    parts = [2.0 * sum(range(part + 1, world + 1, ep)) for part in range(ep)]
    square = (23 * 19 + 301) * dense**2 + NUM_EXPERTS // ep * 13 * 11 * sum(part**2 for part in parts)
    for i in range(2):
        with optimizer.accumulate(last=i == 1):
            sum((state.rank + 1) * p.sum() for p in net.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step(max_norm=factor * square**0.5)
    return float(2.0 - net.dense.detach()[0, 0]) / dense, float(4.0 - net.experts.detach()[0, 0, 0]) / expert


@pytest.mark.parametrize("shard", [True, False], ids=["shard", "replicate"])
@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_one_factor_clips_experts_and_the_rest(ranks: Pools, world: int, ep: int, shard: bool) -> None:
    for factor, moved in ((1.0001, 1.0), (0.999, 0.999), (0.25, 0.25)):
        for both in ranks(world).run(_clipped, ep, shard, factor):
            assert both == pytest.approx((moved, moved), rel=1e-5)


# P13


def _one_bad_element(ep: int, shard: bool, kind: str, name: str) -> tuple[float, bool]:
    """One element of one rank's gradient is not a number: after the exchange only its owner sees that."""
    net, optimizer, state = _made(ep, Options(shard), kind)
    before = [p.detach().clone() for p in net.parameters()]
    with optimizer.accumulate(last=True):
        loss = sum((state.rank + 1) * p.sum() for p in net.parameters())
        if state.rank == state.layout.world_size - 1:
            loss = loss + net.get_parameter(name).flatten()[-1] * float("inf")
        loss.backward()  # type: ignore[union-attr]
    optimizer.step(max_norm=1.0)
    optimizer.finish_gather()
    same = all(torch.equal(p, start) for p, start in zip(net.parameters(), before, strict=True))
    return float(optimizer.skipped_steps), same


@pytest.mark.parametrize("name", ["dense", "vector", "experts"])
@pytest.mark.parametrize("shard", [True, False], ids=["shard", "replicate"])
@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_what_one_rank_sees_all_ranks_skip(ranks: Pools, world: int, ep: int, shard: bool, name: str) -> None:
    for kind in OPTIMIZERS:
        assert ranks(world).run(_one_bad_element, ep, shard, kind, name) == [(1.0, True)] * world


class Poisoned(ParityTrainer):
    """In the second step the last rank's loss, or its embeddings already, are not numbers."""

    where = "loss"

    def _loss(self, batch: Batch) -> LossSums:
        bad = self.step == 1 and self.state.rank == self.state.layout.world_size - 1
        handle = None
        if bad and self.where == "forward":
            handle = self.raw_model.wte.register_forward_hook(lambda module, args, out: out * float("nan"))
        sums = super()._loss(batch)
        if handle is not None:
            handle.remove()
        return LossSums(sums.objective * float("nan"), sums.token, sums.aux) if bad and self.where == "loss" else sums

    def train_step(self, microbatches: list[Batch]) -> None:
        self.optimizer.finish_gather()
        before = self._state()
        super().train_step(microbatches)
        self.optimizer.finish_gather()
        self.changed = [*getattr(self, "changed", []), before != self._state()]

    def _state(self) -> list[bytes]:
        states = [s for state in self.optimizer.inner.state.values() for s in state.values() if torch.is_tensor(s)]
        mains = [piece.main for piece in self.optimizer.pieces()]
        return [t.detach().numpy().tobytes() for t in (*self.raw_model.state_dict().values(), *mains, *states)]


def _train_poisoned(case: Case, folder: Path, where: str) -> dict[str, Any]:
    trainer = type("P", (Poisoned,), {"case": case, "where": where})(case.config(folder))
    trainer.train()
    weights = [w.detach().numpy() for w in trainer.raw_model.parameters()]
    return {
        "changed": trainer.changed,
        "skipped": float(trainer.optimizer.skipped_steps),
        "finite": all(np.isfinite(w).all() for w in weights),
        "norms": [bool(np.isfinite(norm)) for norm in trainer.optimizer.norms],
    }


@pytest.mark.parametrize("where", ["loss", "forward"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("world", "sep", "ep", "shard"), [(2, 1, 2, True), (4, 2, 4, True), (4, 1, 2, False)])
@pytest.mark.sample(4)
def test_a_step_with_nan_on_one_rank_changes_nothing_anywhere(
    ranks: Pools, tmp_path: Path, world: int, sep: int, ep: int, shard: bool, optimizer: Any, where: str
) -> None:
    recipe = Case(1).recipe.__class__(optimizer=optimizer, clip=0.3)
    case = Case(world, 2, "none", shard, sep, ep, experts=EXPERTS, recipe=recipe)
    for found in ranks(world).run(_train_poisoned, case, tmp_path, where, timeout=40):
        assert found["changed"] == [True, False, True, True]
        assert found["norms"] == [True, False, True, True]
        assert (found["skipped"], found["finite"]) == (1, True)
