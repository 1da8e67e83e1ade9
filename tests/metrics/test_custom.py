"""Metrics of one's own: the same values on any number of ranks and micro-batches, in training and validation; mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn as nn
from torch.utils.data import Dataset

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, train, user_error
from tinytron.data import Batch, GlobalBatchSampler, ShuffledEpochs
from tinytron.metrics.custom import MeanMetric, NextTokenAccuracy, create_loss_metric_cls
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
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


class Bare(Outputs):
    """Returns a loss and no logits."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(ids, labels)["loss"]}


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


class NoLogits(WithMetrics):
    train_metric_cls = NextTokenAccuracy

    def _init_model(self, config: Config) -> None:
        self.raw_model = self.model = Bare().to(self.device)


class OfGPT(Trainer):
    """The GPT counts hits in its loss. Labels are masked and weighted; the weights of the model stay."""

    train_metric_cls = NextTokenAccuracy
    calls: ClassVar[list[bool]] = []  # whether a forward pass counted

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset, self.val_dataset = Weighted(32), Weighted(61)

    def _lr_scheduler(self, step: int) -> float:
        return 0.0

    def _loss(self, batch: Batch) -> LossSums:
        self.calls.append(self.raw_model.wants_hits)
        return super()._loss(batch)

    def report(self) -> Any:
        type(self).calls, calls = [], self.calls
        return calls


class Weighted(Dataset[dict[str, torch.Tensor]]):
    """Random samples; some labels are ignored or have the weight 0."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        self.ids = torch.randint(61, (count, 13), generator=generator)
        self.weights = torch.randint(3, (count, 12), generator=generator).float()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.ids[index, 1:].clone()
        labels[: index % 5] = IGNORE_INDEX
        return {"input_ids": self.ids[index, :-1], "labels": labels, "weights": self.weights[index]}


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Forgetful, "ConfigError: the metric Forgets gives mean_id "),
        (Clashing, "ConfigError: the metric Clashes has a value loss, which the log has already; rename it"),
        (NoSuchKey, "ConfigError: the model's outputs have no aux_loss; a metric of it cannot be logged"),
        (NoLogits, "ConfigError: NextTokenAccuracy needs outputs with logits, but the model returned a dict; leave"),
    ],
)
def test_mistakes_are_one_error_on_every_rank(ranks: Pools, tmp_path: Path, cls: type[Trainer], text: str) -> None:
    for error in ranks(2).run(user_error, cls, tmp_path, *SHORT):
        assert error.startswith(text)


def test_a_forgotten_collective_is_right_in_one_process(ranks: Pools, tmp_path: Path) -> None:
    assert ranks(1).run(train, Forgetful, tmp_path, *SHORT)[0].records[0]["mean_id"] > 0


EXPERTS = ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8)
OF_GPT = (*SHORT, "--precision", "fp64", "--init_std", 0.5)


def _naive_accuracy(flags: tuple[object, ...], data: Weighted, samples: list[int]) -> float:
    """The share of the samples' targets that the GPT's logits are largest for."""
    config = config_of(*TINY, *OF_GPT, *flags)
    model = GPT(config.model, dtype=torch.float64, seed=config.seed.seed)
    hits = targets = 0
    for index in samples:
        item = data[index]
        with torch.no_grad():
            logits = model(item["input_ids"][None])
        assert isinstance(logits, torch.Tensor)
        counted = (item["labels"] != IGNORE_INDEX) & (item["weights"] > 0)
        hits += int(((logits[0].argmax(-1) == item["labels"]) & counted).sum())
        targets += int(counted.sum())
    return hits / targets


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, ()), (2, ()), (2, ("--sep_size", 2)), (2, (*EXPERTS, "--ep_size", 2)), (1, EXPERTS)],
    ids=["one", "two", "sep", "ep", "experts"],
)
def test_the_gpt_counts_hits_on_every_layout(
    ranks: Pools, tmp_path: Path, world: int, layout: tuple[object, ...]
) -> None:
    """In validation without being asked, in training in the steps that are reported."""
    result = ranks(world).run(train, OfGPT, tmp_path, *OF_GPT, *layout)[0]
    val = next(record for record in result.records if record["stage"] == "val")
    assert val["accuracy"] == pytest.approx(_naive_accuracy(layout, Weighted(61), list(range(61))), rel=1e-12)
    assert 0 < val["accuracy"] < 1
    sampler = GlobalBatchSampler(ShuffledEpochs(32, 1337), global_batch=8, micro_batch=1, dp_rank=0, dp_size=1)
    for record in (record for record in result.records if record["stage"] == "train"):
        assert ("accuracy" in record) == (record["step"] != 3)
        if record["step"] != 3:
            expected = _naive_accuracy(layout, Weighted(32), sampler.samples_of_step(record["step"] - 1))
            assert record["accuracy"] == pytest.approx(expected, rel=1e-12)
    micro_batches = 4 // (world if "--sep_size" not in layout and world == 2 else 1)
    asked = [step != 3 for step in (1, 2, 3, 4) for _ in range(micro_batches)]
    assert result.extra[: len(asked)] == asked, "the loss of other steps counts nothing"
    assert all(result.extra[len(asked) :]), "validation always counts"
