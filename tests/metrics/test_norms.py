"""Norms of every tensor against whole tensors of one plain process; that measuring changes nothing; models of one's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.helpers.parity import EXPERTS, STEPS, Case, ParityTrainer, twin
from tests.helpers.ranks import Ranks
from tests.helpers.runs import read_logs, train, untimed
from tests.naive.training import Recipe
from tinytron.data import Batch
from tinytron.distributed import DistributedOptimizer, ParallelLayout, ParallelState
from tinytron.distributed.zero1.norms import KINDS, TensorNorms
from tinytron.model.modules.loss import LossSums
from tinytron.training import Config, Trainer

Pools = Callable[[int], Ranks]


class Measured(ParityTrainer):
    """Keeps the norms of whole weights, and of their differences, by step; where a rank holds all of a tensor."""

    def train_step(self, microbatches: list[Batch]) -> None:
        before = {name: p.detach().double().clone() for name, p in self.raw_model.named_parameters()}
        super().train_step(microbatches)
        self.optimizer.finish_gather()
        after = {name: p.detach().double() for name, p in self.raw_model.named_parameters()}
        self.moved = getattr(self, "moved", [])
        self.moved.append(
            {name: (float(new.norm()), float((new - before[name]).norm())) for name, new in after.items()}
        )


def run_measured(case: Case, log_dir: Path, on: bool = True) -> dict[str, Any]:
    """Train on this rank. A job for the pool."""
    config = case.config(log_dir)
    config = dataclasses.replace(config, logging=dataclasses.replace(config.logging, log_norms=on))
    trainer = type("T", (Measured,), {"case": case})(config)
    trainer.train()
    records = read_logs(trainer.log_dir)[1] if trainer.master_process else []
    buffers = trainer.optimizer.buffers
    return {"records": records, "moved": trainer.moved, "padding": [padding(buffer) for buffer in buffers]}


def padding(buffer: Any) -> float:
    """The largest gradient outside of all parameters."""
    outside = torch.ones_like(buffer.grad_data, dtype=torch.bool)
    for slot in buffer.layout.slots:
        outside[slot.start : slot.end] = False
    return float((buffer.grad_data.abs() * outside).max())


def by_kind(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        kind: {
            name.removeprefix(f"{kind}_norms/"): value
            for name, value in record.items()
            if name.startswith(f"{kind}_norms/")
        }
        for kind in KINDS
    }


SOME = dataclasses.replace(EXPERTS, first_k_dense=1)
CASES = [
    Case(1, 2, "uneven"),
    Case(2, 2, "uneven", small_buckets=True),
    Case(2, 1, "uneven", shard=False),
    Case(2, 1, "uneven", sep=2, recipe=Recipe(clip=0.0)),
    Case(2, 1, "uneven", ep=2, experts=SOME),
    Case(2, 1, "uneven", ep=2, experts=SOME, shard=False),
    Case(4, 1, "uneven", sep=2, ep=2, experts=SOME, small_buckets=True),
    Case(4, 2, "uneven", ep=4, experts=SOME, shard=False, tied=False),
    Case(2, 1, "uneven", recipe=Recipe(optimizer="muon", clip=0.3), small_buckets=True),
]


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"world{c.world}sep{c.sep}ep{c.ep}-{'zero' if c.shard else 'plain'}"
)
@pytest.mark.sample(10)
def test_norms_are_those_of_whole_tensors(ranks: Pools, tmp_path: Path, case: Case, precision: Any) -> None:
    """Weights and updates as one process sees them; gradients of the naive twin before clipping."""
    case = dataclasses.replace(case, precision=precision)
    alone = dataclasses.replace(case, world=1, sep=1, ep=1, accumulation=1)
    moved = ranks(1).run(run_measured, alone, tmp_path / "one", False)[0]["moved"]
    (records, *_), expected = (r["records"] for r in ranks(case.world).run(run_measured, case, tmp_path)), twin(case)
    tolerance = 1e-10 if precision == "fp64" else 1e-5
    assert len(records) == STEPS
    for step, record in enumerate(records):
        found, norm = by_kind(record), expected.norms[step]
        clipped = min(1.0, case.recipe.clip / (norm + 1e-6)) if case.recipe.clip else 1.0
        assert all(set(found[kind]) == set(moved[step]) for kind in KINDS)
        for name, (weight, update) in moved[step].items():
            assert found["param"][name] == pytest.approx(weight, rel=tolerance)
            assert found["update"][name] == pytest.approx(update, rel=100 * tolerance)
            gradient = float((expected.grads[step][name] ** 2).sum() ** 0.5) / clipped
            assert found["grad"][name] == pytest.approx(gradient, rel=tolerance)
        assert math.hypot(*found["grad"].values()) == pytest.approx(record["grad_norm"], rel=1e-5)
        assert record["param_norm"] == pytest.approx(math.hypot(*found["param"].values()))
        assert record["update_norm"] == pytest.approx(math.hypot(*found["update"].values()))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_run_sees_its_own_weights_to_a_millionth(ranks: Pools, tmp_path: Path, world: int) -> None:
    found = ranks(world).run(run_measured, Case(world), tmp_path)[0]
    for record, moved in zip(found["records"], found["moved"], strict=True):
        norms = by_kind(record)
        for name, (weight, update) in moved.items():
            assert norms["param"][name] == pytest.approx(weight, rel=1e-6)
            assert norms["update"][name] == pytest.approx(update, rel=1e-6)


@pytest.mark.parametrize(("world", "shard"), [(1, True), (2, True), (2, False), (4, True)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_measuring_changes_no_bit(ranks: Pools, tmp_path: Path, world: int, shard: bool, optimizer: Any) -> None:
    """The copy of the weights is where the next gradients go; their padding must stay zero."""
    recipe = Recipe(optimizer=optimizer, clip=0.3)
    case = Case(world, 2, shard=shard, small_buckets=True, recipe=recipe)
    runs = [ranks(world).run(run_measured, case, tmp_path / str(on), on) for on in (True, False)]
    with_norms, without = (untimed(run[0]["records"]) for run in runs)
    assert without == [{name: value for name, value in r.items() if "_norms/" not in name and name not in (
        "param_norm", "update_norm")} for r in with_norms]  # fmt: skip
    assert any("update_norm" in record for record in with_norms)
    assert [result["padding"] for result in runs[0]] == [[0.0] * len(r["padding"]) for r in runs[1]]


def _rejected() -> tuple[dict[str, dict[str, float]], float]:
    """The norms of a step that is rejected, and that of the weight. A job for the pool."""
    layer, world = nn.Linear(3, 5), torch.distributed.get_world_size()
    state = ParallelState.create(ParallelLayout(world), torch.device("cpu"))
    optimizer = DistributedOptimizer(torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True))
    for reject in (False, True):
        optimizer.tensor_norms = TensorNorms(optimizer.buffers, state, optimizer.loss_scale)
        with optimizer.accumulate(last=True):
            layer(torch.ones(2, 3)).sum().backward()
        optimizer.step(max_norm=1e-3, reject=lambda norm, skip=reject: torch.full_like(norm, skip))
        optimizer.zero_grad()
    assert optimizer.tensor_norms is not None
    return optimizer.tensor_norms.totals(), float(layer.weight.detach().norm())


@pytest.mark.parametrize("world", [1, 2])
def test_a_rejected_step_updates_nothing(ranks: Pools, world: int) -> None:
    for totals, weight in ranks(world).run(_rejected):
        assert totals["update"] == {"param0": 0.0, "param1": 0.0}
        assert totals["param"]["param0"] == pytest.approx(weight)
        assert totals["grad"]["param0"] == pytest.approx(2 * 15**0.5 * world)  # every weight's gradient is 2 a rank


class Own(nn.Module):
    """A model that is not ours."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> LossSums:
        loss = F.cross_entropy(self.head(self.table(ids)).flatten(0, 1), labels.flatten(), reduction="sum")
        return LossSums(loss, loss.detach())


class OwnTrainer(Trainer):
    def _init_model(self, config: Config) -> None:
        self.raw_model = self.model = Own()


@pytest.mark.parametrize("world", [1, 2])
def test_models_of_ones_own_and_only_steps_that_are_reported(ranks: Pools, tmp_path: Path, world: int) -> None:
    flags = ("--log_norms", "--log_every", 3, "--max_steps", 4, "--no-do_save")
    records = ranks(world).run(train, OwnTrainer, tmp_path, *flags)[0].records
    assert [r["step"] for r in records if "update_norm" in r] == [1, 3, 4]
    assert sorted(by_kind(records[0])["param"]) == ["head.bias", "head.weight", "table.weight"]
    assert not any(
        "update_norm" in r for r in ranks(1).run(train, OwnTrainer, tmp_path / "off", "--max_steps", 1)[0].records
    )
