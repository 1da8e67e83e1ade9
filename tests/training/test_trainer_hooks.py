"""What users override: the documented snippets, verbatim, the other ``_init_*`` and ``_loss``; data: test_trainer_data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, losses, train, user_error
from tinytron.data import Batch, MockDataset
from tinytron.distributed import DistributedOptimizer
from tinytron.model.modules.loss import LossSums
from tinytron.training import Config, Trainer
from tinytron.utils.sequences import IGNORE_INDEX

Pools = Callable[[int], Ranks]
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])
SHORT = ("--max_steps", 4, "--debug")


# Optimizers.


class Documented(Trainer):
    # fmt: off
    def _init_optimizer(self, config):  # type: ignore[no-untyped-def]
        self.optimizer = torch.optim.AdamW(self.raw_model.parameters(), lr=config.optim.max_lr)
        self.optimizer = DistributedOptimizer(optimizer=self.optimizer, process_group=self.dp_group)
    # fmt: on

    def report(self) -> dict[str, Any]:
        options = self.optimizer.options
        return {
            "type": type(self.optimizer).__name__,
            "raw": type(self.raw_optimizer).__name__,
            "buckets": [len(buffer.layout.buckets) for buffer in self.optimizer.buffers],
            "shards": [buffer.num_shards for buffer in self.optimizer.buffers],
            "options": (options.shard, options.grad_as_view, options.allow_unused),
            "scale": float(self.optimizer.loss_scale),
        }


class Unwrapped(Documented):
    def _init_optimizer(self, config: Config) -> None:
        self.optimizer = torch.optim.AdamW(self.raw_model.parameters(), lr=config.optim.max_lr)  # type: ignore[assignment]


class Momentum(Documented):
    def _init_optimizer(self, config: Config) -> None:
        self.optimizer = torch.optim.SGD(self.raw_model.parameters(), lr=1.0, momentum=0.9)  # type: ignore[assignment]


@pytest.mark.parametrize("cls", [Documented, Unwrapped, Momentum])
def test_own_optimizers_train_alike_in_every_world(ranks: Pools, tmp_path: Path, cls: type[Documented]) -> None:
    logs = []
    for world in (1, 2, 4):
        result = ranks(world).run(train, cls, tmp_path / str(world), *SHORT)[0]
        assert result.extra["type"] == "DistributedOptimizer"
        assert result.extra["raw"] in ("AdamW", "SGD")
        assert result.extra["shards"] == [world]
        logs.append(losses(result.log))
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert logs[2] == pytest.approx(logs[0], rel=1e-5)
    assert logs[0][4] != logs[0][1]


def test_the_documented_optimizer_is_the_unwrapped_one(ranks: Pools, tmp_path: Path) -> None:
    wrapped, plain = (ranks(2).run(train, cls, tmp_path / cls.__name__, *SHORT)[0] for cls in (Documented, Unwrapped))
    assert wrapped.log == plain.log


class _PlainLoop(Trainer):
    """The documented snippet's optimizer without us: one process, whole parameters, torch's own clipping."""

    def train_step(self, microbatches: list[Batch]) -> None:
        if not hasattr(self, "adamw"):
            self.twin = [p.detach().clone() for p in self.raw_model.parameters()]
            self.adamw = torch.optim.AdamW(self.twin, lr=self.config.optim.max_lr)
        self.adamw.param_groups[0]["lr"] = self._lr_scheduler(self.step)
        params = list(self.raw_model.parameters())
        with torch.no_grad():
            for p, t in zip(params, self.twin, strict=True):
                p.copy_(t)
        count = sum(int((b.labels != IGNORE_INDEX).sum()) for b in microbatches)
        loss = sum(self._loss(b).objective for b in microbatches) / count
        for t, grad in zip(self.twin, torch.autograd.grad(loss, params), strict=True):
            t.grad = grad
        norm = nn.utils.clip_grad_norm_(self.twin, self.config.train.grad_clip_value)
        self.adamw.step()
        self.reporter.window.add(self.step + 1, self._lr_scheduler(self.step), {"loss": loss.detach()}, norm)


def test_the_documented_optimizer_is_torchs_own(ranks: Pools, tmp_path: Path) -> None:
    ours = ranks(2).run(train, Documented, tmp_path / "ours", *SHORT)[0]
    plain = ranks(1).run(train, _PlainLoop, tmp_path / "plain", *SHORT)[0]
    assert losses(ours.log) == pytest.approx(losses(plain.log), rel=1e-5)
    norms = [[r["grad_norm"] for r in run.records] for run in (ours, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_an_unwrapped_optimizer_is_wrapped_as_the_flags_say(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--no-use_distributed_optimizer", "--no-ddp_gradient_as_bucket_view", "--ddp_find_unused_parameters")
    extra = ("--bucket_size_mb", 0.002, "--precision", "fp16", *SHORT)
    found = ranks(2).run(train, Unwrapped, tmp_path, *flags, *extra)[0].extra
    assert found["options"] == (False, False, True)
    assert found["shards"] == [1]
    assert found["buckets"][0] >= 5
    assert found["scale"] > 1.0


class _Forgetful(Trainer):
    def _init_optimizer(self, config: Config) -> None:
        self.optimizer = torch.optim.AdamW(self.raw_model.blocks.parameters())  # type: ignore[assignment]


def test_an_optimizer_that_misses_parameters_is_one_error(ranks: Pools, tmp_path: Path) -> None:
    first, second = ranks(2).run(user_error, _Forgetful, tmp_path)
    assert first == second
    assert first.startswith("ConfigError: the optimizer does not update 2 trainable parameters (wte.weight, final_norm")


# Model and loss.


class Doubled(Trainer):
    """Twice the objective: twice the gradient, the same logged loss."""

    def _loss(self, batch: Batch) -> LossSums:
        sums = super()._loss(batch)
        return LossSums(2 * sums.objective, sums.token)


def test_an_own_loss_is_differentiated(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--grad_clip_value", 0, "--max_steps", 1, "--debug")
    plain, doubled = (ranks(2).run(train, cls, tmp_path / cls.__name__, *flags)[0] for cls in (Trainer, Doubled))
    assert plain.log == doubled.log
    assert doubled.records[0]["grad_norm"] == pytest.approx(2 * plain.records[0]["grad_norm"], rel=1e-6)


class Bigram(nn.Module):
    """A model of somebody else's: no param_specs, logits in full."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> LossSums:
        values = self.head(self.table(ids)).flatten(0, 1)
        total = F.cross_entropy(values, labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
        return LossSums(total, total.detach())


class OwnModel(Trainer):
    def _init_model(self, config: Config) -> None:
        self.raw_model = self.model = Bigram().to(self.device)

    def _lr_scheduler(self, step: int) -> float:
        return 0.1 / (step + 1)


def test_an_own_model_and_schedule(ranks: Pools, tmp_path: Path) -> None:
    one, two = (ranks(w).run(train, OwnModel, tmp_path / str(w), "--do_val")[0] for w in (1, 2))
    assert losses(two.log) == pytest.approx(losses(one.log), rel=1e-5)
    assert losses(two.log, "val") == pytest.approx(losses(one.log, "val"), rel=1e-5)
    assert [r["lr"] for r in one.records if r["stage"] == "train"] == [0.1 / t for t in (1, 2, 3, 4)]
    again = ranks(2).run(train, OwnModel, tmp_path / "2", "--do_val", "--max_steps", 5)[0]
    assert again.log.startswith(two.log)  # resumed: bias and embedding states found their places


class UnseededModel(Trainer):
    """Weights from torch's own initialization: its generator is in another state on every rank."""

    def _init_model(self, config: Config) -> None:
        model = Bigram()
        for module in (model.table, model.head):
            torch.seed() if self.dp_rank else torch.manual_seed(1)
            module.reset_parameters()
        self.raw_model = self.model = model

    def report(self) -> bytes:
        return b"".join(p.detach().numpy().tobytes() for p in self.raw_model.parameters())


@pytest.mark.parametrize("zero", ["--use_distributed_optimizer", "--no-use_distributed_optimizer"])
def test_all_ranks_start_from_the_first_ones_weights(ranks: Pools, tmp_path: Path, zero: str) -> None:
    one, two = (ranks(w).run(train, UnseededModel, tmp_path / str(w), *SHORT, zero) for w in (1, 2))
    assert two[0].extra == two[1].extra
    assert losses(two[0].log) == pytest.approx(losses(one[0].log), rel=1e-5)


class Unused(Trainer):
    def _init_model(self, config: Config) -> None:
        super()._init_model(config)
        self.raw_model.extra = nn.Linear(3, 3)


def test_unused_parameters_are_an_error_unless_accepted(ranks: Pools, tmp_path: Path) -> None:
    for error in ranks(2).run(user_error, Unused, tmp_path, *SHORT):
        assert error.startswith("ConfigError: 2 parameters got no gradient in the last backward (extra.")
        assert "--ddp_find_unused_parameters" in error
    plain, extra = (
        ranks(2).run(train, cls, tmp_path / cls.__name__, *SHORT, "--ddp_find_unused_parameters")[0]
        for cls in (Trainer, Unused)
    )
    assert losses(plain.log) == pytest.approx(losses(extra.log), rel=1e-6)


class Poisoned(Trainer):
    """On one rank the loss of step 2 is not a number."""

    def _loss(self, batch: Batch) -> LossSums:
        sums = super()._loss(batch)
        bad = self.step == 1 and self.dp_rank == 1
        return LossSums(sums.objective * float("nan"), sums.token) if bad else sums

    def report(self) -> tuple[Any, float]:
        return self.raw_model.state_dict()["wte.weight"].numpy().tobytes(), float(self.optimizer.skipped_steps)


@pytest.mark.parametrize("zero", ["--use_distributed_optimizer", "--no-use_distributed_optimizer"])
def test_a_step_with_nan_on_one_rank_is_skipped_on_all(ranks: Pools, tmp_path: Path, zero: str) -> None:
    results = ranks(2).run(train, Poisoned, tmp_path, *SHORT, zero)
    assert results[0].extra == (results[1].extra[0], 1.0)
    assert results[0].records[1]["grad_norm"] == "nan"
    assert all(np.isfinite(loss) for loss in losses(results[0].log).values())


def test_mock_data_and_config_are_importable_as_documented() -> None:
    """The names users import."""
    assert config_of(*TINY).train.seq_len == 12
    assert len(MockDataset(3, 12, 61, seed=0)) == 3
