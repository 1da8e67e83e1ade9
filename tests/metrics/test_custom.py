"""Metrics of one's own: the same values on any number of ranks and micro-batches, in training and validation; mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

from tests.helpers.ranks import Ranks
from tests.helpers.runs import train, user_error
from tinytron.metrics.custom import MeanMetric, NextTokenAccuracy, create_loss_metric_cls
from tinytron.training import Config, Trainer
from tinytron.utils.sequences import IGNORE_INDEX

Pools = Callable[[int], Ranks]
SHORT = ("--max_steps", 4, "--log_every", 2, "--do_val", "--no-do_save")


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.table(ids))
        mean = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
        return {"logits": logits, "loss": mean, "spread": logits.std()}


class Kept(MeanMetric):
    """The mean token id, and how often it was updated."""

    updates = 0

    def update(self, outputs: Any, inputs: Mapping[str, Any]) -> None:
        assert not torch.is_grad_enabled()
        type(self).updates += 1
        self.add("mean_id", inputs["input_ids"].sum(), inputs["input_ids"].numel())


class WithMetrics(Trainer):
    train_metric_cls = (NextTokenAccuracy, create_loss_metric_cls("spread"), Kept)
    eval_metric_cls = NextTokenAccuracy

    def _init_model(self, config: Config) -> None:
        Kept.updates = 0
        self.raw_model = self.model = Outputs().to(self.device)

    def _lr_scheduler(self, step: int) -> float:
        return 0.0  # the weights stay, so that every value can be computed afterwards

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = {"updates": Kept.updates, "train": [], "val": []}
        for step in (0, 1, 3):
            batches = next(iter(self.data.steps(step)))
            found["train"].append([(b.input_ids, b.labels) for b in batches])
        found["val"] = [(b.input_ids, b.labels) for b in self.data.validation()]
        return found


def _expected(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """The values by one loop over all micro-batches of all ranks."""
    model = Outputs()
    hits, targets, spreads, total, ids = 0, 0, [], 0, 0
    with torch.no_grad():
        for inputs, labels in batches:
            logits = model(inputs, labels)["logits"]
            hits += int(((logits.argmax(-1) == labels) & (labels != IGNORE_INDEX)).sum())
            targets += int((labels != IGNORE_INDEX).sum())
            spreads.append(float(logits.std()))
            total, ids = total + int(inputs.sum()), ids + inputs.numel()
    return {"accuracy": hits / targets, "spread": sum(spreads) / len(spreads), "mean_id": total / ids}


@pytest.mark.parametrize("world", [1, 2])
def test_values_are_those_of_one_loop_over_everything(ranks: Pools, tmp_path: Path, world: int) -> None:
    results = ranks(world).run(train, WithMetrics, tmp_path, *SHORT)
    records = [record for record in results[0].records if record["stage"] == "train"]
    assert results[0].extra["updates"] == 3 * 4 // world  # of 4 steps, 1, 2 and 4 are reported
    for i, step in enumerate((1, 2, 4)):
        batches = [batch for result in results for batch in result.extra["train"][i]]
        record = records[step - 1]
        assert {name: record[name] for name in ("accuracy", "spread", "mean_id")} == pytest.approx(_expected(batches))
    assert "accuracy" not in records[2]
    (val,) = (record for record in results[0].records if record["stage"] == "val")
    batches = [batch for result in results for batch in result.extra["val"]]
    assert val["accuracy"] == pytest.approx(_expected(batches)["accuracy"])
    assert "spread" not in val


class Forgets(MeanMetric):
    """Its ``gather`` combines nothing."""

    def update(self, outputs: Any, inputs: Mapping[str, Any]) -> None:
        self.add("mean_id", inputs["input_ids"].sum(), inputs["input_ids"].numel())

    def gather(self) -> None:
        pass


class Clashes(Kept):
    def to_dict(self) -> dict[str, float]:
        return {"loss": 1.0}


class NoSuchKey(WithMetrics):
    train_metric_cls = create_loss_metric_cls("aux_loss")


class Forgetful(WithMetrics):
    train_metric_cls = Forgets


class Clashing(WithMetrics):
    train_metric_cls = Clashes


class NoLogits(Trainer):
    train_metric_cls = NextTokenAccuracy


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Forgetful, "ConfigError: the metric Forgets gives mean_id "),
        (Clashing, "ConfigError: the metric Clashes has a value loss, which the log has already; rename it"),
        (NoSuchKey, "ConfigError: the model's outputs have no aux_loss; a metric of it cannot be logged"),
        (NoLogits, "ConfigError: NextTokenAccuracy needs outputs with logits, but the model returned a LossSums"),
    ],
)
def test_mistakes_are_one_error_on_every_rank(ranks: Pools, tmp_path: Path, cls: type[Trainer], text: str) -> None:
    for error in ranks(2).run(user_error, cls, tmp_path, *SHORT):
        assert error.startswith(text)


def test_a_forgotten_collective_is_right_in_one_process(ranks: Pools, tmp_path: Path) -> None:
    assert ranks(1).run(train, Forgetful, tmp_path, *SHORT)[0].records[0]["mean_id"] > 0
