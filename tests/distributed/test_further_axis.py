"""A mesh axis that the library does not have: a parameter cut along dimension 1 over it trains, and is saved and loaded
on any layout, as on one process. (What a model has to do for tensor parallelism, at its smallest.)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.nn.functional import all_reduce

from tests.distributed.test_sharding import WideLayout
from tests.helpers.parity import assembled, placed
from tests.helpers.ranks import Ranks
from tinytron.checkpoint.files import CheckpointFiles
from tinytron.checkpoint.host_buffers import HostBuffers
from tinytron.checkpoint.load import load_checkpoint, read_meta
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.checkpoint.save import write_checkpoint
from tinytron.checkpoint.snapshot import take_snapshot
from tinytron.checkpoint.tools import consolidate, problems
from tinytron.distributed import DistributedOptimizer, ParallelState, ParamSpec
from tinytron.distributed.param_spec import Shard
from tinytron.distributed.replicas import check_replicas
from tinytron.distributed.sharding import box_of
from tinytron.model.gpt import fill_normal, named_normal

Pools = Callable[[int], Ranks]
Outcome = tuple[list[float], dict[str, Any]]  # norms, and weights and moments by name
IN, OUT, ROWS, STEPS, SEED = 12, 5, 8, 4, 3
CLIP, ADAM = 0.3, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9)}
SHAPES = {"scale": (IN,), "matrix": (OUT, IN), "bias": (OUT,)}
LAYOUTS = [(1, 1, 1), (2, 1, 2), (4, 1, 2), (4, 2, 2), (4, 1, 4), (4, 2, 1)]  # world, sep, tp
TINY_BUCKETS = 20 * 4 / 2**20  # MiB: owned ranges begin and end in the middle of rows


class Toy(nn.Module):
    """``[T, IN] -> [T, OUT]``; each rank of ``tp`` has some columns of the matrix, and sees those columns of the input."""

    def __init__(self, state: ParallelState) -> None:
        super().__init__()
        self.state = state
        for spec in self.param_specs():
            box = box_of(spec, state)
            parameter = nn.Parameter(torch.empty(box.size, dtype=torch.float64))
            fill_normal(parameter.data, spec, box, 1.0, SEED)
            self.register_parameter(spec.name, parameter)

    def param_specs(self) -> list[ParamSpec]:
        """One of the three is cut."""
        cuts = {"matrix": (Shard("tp", 1),)}
        return [ParamSpec(name, shape, "matrix", cuts.get(name, ())) for name, shape in SHAPES.items()]

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        mine = box_of(self.param_specs()[1], self.state).slices[1]
        partial_TO = (x_TD * self.scale)[:, mine] @ self.matrix.T
        return all_reduce(partial_TO, group=self.state.groups["tp"]) + self.bias  # its gradient is summed, too


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    return tuple(torch.randn(ROWS, n, generator=random, dtype=torch.float64) for n in (IN, OUT))  # type: ignore[return-value]


def one_process(steps: int) -> Outcome:
    """The same by plain torch."""
    weights = {name: named_normal(name, shape, 1.0, SEED).double() for name, shape in SHAPES.items()}
    scale, matrix, bias = parameters = [nn.Parameter(weight) for weight in weights.values()]
    optimizer, norms = torch.optim.AdamW(parameters, **ADAM), []
    for step in range(steps):
        x, y = global_batch(step)
        optimizer.zero_grad()
        (((x * scale) @ matrix.T + bias - y).square().sum() / ROWS).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
    found = {}
    for name, parameter in zip(SHAPES, parameters, strict=True):
        found[f"{name}/main"] = parameter.detach().numpy().flatten()
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{name}/{key}"] = optimizer.state[parameter][key].numpy().flatten()
    return norms, found


def _made(sep: int, tp: int, options: dict[str, Any]) -> tuple[Toy, DistributedOptimizer, ParallelState]:
    state = ParallelState.create(WideLayout(dist.get_world_size(), sep, tp=tp), torch.device("cpu"))
    toy = Toy(state)
    optimizer = DistributedOptimizer(
        torch.optim.AdamW(toy.parameters(), **ADAM), bucket_size_mb=TINY_BUCKETS, **options
    )
    optimizer.attach(toy, toy.param_specs(), state)
    return toy, optimizer, state


def _trained(toy: Toy, optimizer: DistributedOptimizer, state: ParallelState, first: int, last: int) -> Any:
    """Norms of the steps, and this rank's parts of main weights and moments."""
    norms = []
    share = ROWS // state.layout.size("dp*sep")
    start = state.group_rank("dp*sep") * share
    for step in range(first, last):
        x, y = (part[start : start + share] for part in global_batch(step))
        count = torch.tensor(float(share))
        dist.all_reduce(count, group=state.groups["world"])  # ranks of one tp group count, and compute, the same rows
        optimizer.finish_gather()  # this model waits for nothing
        with optimizer.accumulate(last=True):
            ((toy(x) - y).square().sum() / count).backward()
        norms.append(float(optimizer.step(max_norm=CLIP)))
        optimizer.zero_grad()
    check_replicas(last, optimizer, state)
    parts = []
    for piece in optimizer.pieces():
        values = {"main": piece.main, **optimizer.inner.state[piece.holder]}
        for key in ("main", "exp_avg", "exp_avg_sq"):
            start = 0 if key == "main" else piece.start
            own = values[key].detach().view(-1)[start : start + len(piece.main)].numpy().copy()
            parts += [(f"{piece.name}/{key}", piece.numel, offset, part) for offset, part in placed(piece, own)]
    return norms, parts


def _train(sep: int, tp: int, options: dict[str, Any]) -> Any:
    return _trained(*_made(sep, tp, options), 0, STEPS)


def _compare(results: list[Any], expected: Outcome, owners: int | None) -> None:
    norms, whole = expected
    for found, _ in results:
        assert found == pytest.approx(norms, rel=1e-10)
    found = assembled([parts for _, parts in results], owners=owners)
    assert found.keys() == whole.keys()
    for key, values in whole.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-10, atol=1e-13, err_msg=key)


@pytest.mark.parametrize("shard", [True, False], ids=["shard", "replicate"])
@pytest.mark.parametrize(("world", "sep", "tp"), LAYOUTS)
def test_training_equals_one_process(ranks: Pools, world: int, sep: int, tp: int, shard: bool) -> None:
    for overlap in (True, False):
        options = {"shard": shard, "overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
        _compare(ranks(world).run(_train, sep, tp, options), one_process(STEPS), 1 if shard else None)


def _save(folder: Path, sep: int, tp: int) -> None:
    toy, optimizer, state = _made(sep, tp, {})
    _trained(toy, optimizer, state, 0, 2)
    optimizer.finish_gather()
    snapshot = take_snapshot(CheckpointFiles(folder, 2), toy, optimizer, CheckpointMeta(), state, HostBuffers())
    write_checkpoint(snapshot, state.groups["world"])


def _continue(folder: Path, sep: int, tp: int, shard: bool) -> Any:
    toy, optimizer, state = _made(sep, tp, {"shard": shard})
    files = CheckpointFiles(folder, 2)
    load_checkpoint(files, read_meta(files.meta), toy, optimizer, state)
    norms, parts = _trained(toy, optimizer, state, 2, STEPS)
    return [*one_process(2)[0], *norms], parts


@pytest.mark.parametrize("saved_on", [(4, 1, 2), (4, 1, 4), (2, 2, 1)])
def test_saved_on_one_layout_it_continues_on_any(ranks: Pools, tmp_path: Path, saved_on: tuple[int, int, int]) -> None:
    world, sep, tp = saved_on
    ranks(world).run(_save, tmp_path, sep, tp)
    files = CheckpointFiles(tmp_path, 2)
    assert problems(files) == []
    _, expected = one_process(2)
    weights = torch.load(files.model, weights_only=True)
    content = torch.load(consolidate(files), weights_only=True)
    for name, shape in SHAPES.items():
        assert weights[name].shape == content["model"][name].shape == shape
        np.testing.assert_allclose(weights[name].flatten().numpy(), expected[f"{name}/main"], rtol=1e-10)
        moment = content["optimizer"][name]["exp_avg"]
        np.testing.assert_allclose(moment.flatten().numpy(), expected[f"{name}/exp_avg"], rtol=1e-10, atol=1e-13)
    for world, sep, tp in LAYOUTS:
        for shard in (True, False):
            results = ranks(world).run(_continue, tmp_path, sep, tp, shard)
            _compare(results, one_process(STEPS), 1 if shard else None)


def _initialized(sep: int, tp: int) -> list[Any]:
    toy, _, state = _made(sep, tp, {})
    parts: list[Any] = []
    for spec in toy.param_specs():
        flat, first = toy.get_parameter(spec.name).detach().numpy().flatten(), 0
        for offset, length in box_of(spec, state).runs():
            parts.append((spec.name, spec.numel, offset, flat[first : first + length]))
            first += length
    return parts


@pytest.mark.parametrize(("world", "sep", "tp"), LAYOUTS)
def test_initial_values_do_not_depend_on_the_layout(ranks: Pools, world: int, sep: int, tp: int) -> None:
    found = assembled(ranks(world).run(_initialized, sep, tp))
    for name, shape in SHAPES.items():
        np.testing.assert_array_equal(found[name], named_normal(name, shape, 1.0, SEED).double().numpy().flatten())
