"""Padding is not a token to the routers, wherever it comes from; and what auxiliary sums are divided by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from tests.data.test_samples import documents, write
from tests.helpers.errors import says
from tests.helpers.ranks import Ranks
from tests.helpers.runs import train
from tests.metrics.test_routing import margins_of, read_trace
from tinytron.data import Batch, GlobalBatchSampler, MockDataset, ShuffledEpochs
from tinytron.errors import DataError
from tinytron.model.modules.loss import LossSums, fused_linear_cross_entropy
from tinytron.training import Config, Trainer
from tinytron.training.batch_preparer import check_batch
from tinytron.utils.sequences import IGNORE_INDEX

Pools = Callable[[int], Ranks]
K, LENGTH = 2, 12
MOE = (
    *("--use_moe", "--num_experts", 4, "--num_experts_per_tok", K, "--moe_intermediate_size", 8),
    *("--moe_bias_update_rate", 0.01, "--moe_z_loss_coef", 0.001, "--precision", "fp64", "--no-do_save"),
)
PACKED = ("--no-use_mock_data", "--packing", "best_fit", "--max_steps", 3)


class Loads(Trainer):
    """Keeps the load of every step, and the targets of its rows."""

    def _loss(self, batch: Batch) -> LossSums:
        self.targets = getattr(self, "targets", 0) + int(batch.targets()) * self.model.training
        return super()._loss(batch)

    def _end_step(self) -> None:
        self.loads = [*getattr(self, "loads", []), self.raw_model.step_load.clone()]
        super()._end_step()

    def report(self) -> Any:
        return torch.stack(self.loads).sum(0), self.targets


def totals(results: list[Any]) -> tuple[list[list[int]], int]:
    """Load by layer and expert, and targets, of all ranks and steps."""
    return sum(r.extra[0] for r in results).tolist(), sum(r.extra[1] for r in results)


@pytest.mark.parametrize("masks", [(), ("--document_mask",)], ids=["one row", "documents"])
def test_the_unused_end_of_packed_rows_is_not_routed(ranks: Pools, tmp_path: Path, masks: tuple[str, ...]) -> None:
    write(tmp_path / "data", documents([7, 8, 9] * 30))  # of which no two fit in a row
    flags = (*MOE, *PACKED, *masks, "--dataset_path", tmp_path / "data", "--moe_route_trace", "--moe_router_debug")
    runs = {}
    for world, sep in ((1, 1), (2, 1), (2, 2)):
        results = ranks(world).run(train, Loads, tmp_path / f"{world}{sep}", *flags, "--sep_size", sep)
        load, targets = runs[world, sep] = totals(results)
        assert targets < 3 * 8 * LENGTH, "some rows are not full"
        assert [sum(of_layer) for of_layer in load] == [K * targets] * len(load)
        traced = [line for line in read_trace(results[0].folder) if line["step"] == 3]
        margins = [layer["mean"] for layer in margins_of(results[0])[3]]
        for layer, mean in enumerate(margins):
            of_layer = [line["margin"] for line in traced if line["layer"] == layer]
            assert mean == pytest.approx(sum(of_layer) / len(of_layer))
        # Documents begin with token 0, so a 0 behind a 0 is the end of a row.
        places = {(line["layer"], line["row"], line["position"]): line["token"] for line in traced}
        assert not any(
            token == 0 and places.get((layer, row, at - 1)) == 0 for (layer, row, at), token in places.items()
        )
    assert runs[2, 1] == runs[2, 2] == runs[1, 1]


class Rows(Dataset[Any]):
    """Prompts and answers of 3 to 12 tokens; the rest of a row is filled up in the way that ``kind`` says."""

    kind = "key"

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random, real = torch.Generator().manual_seed(index), self.real(index)
        ids = torch.randint(1, 61, (LENGTH + 1,), generator=random)
        inputs, labels = ids[:-1].clone(), ids[1:].clone()
        whole = labels.clone()
        labels[: real // 2] = labels[real:] = IGNORE_INDEX  # a prompt is text all the same
        inputs[real:] = 0
        padding = torch.arange(LENGTH) >= real
        if self.kind == "key":
            return {"input_ids": inputs, "labels": labels, "padding": padding.long()}
        positions = torch.arange(LENGTH) - padding.long() * real
        if self.kind == "weight":
            weights = (labels != IGNORE_INDEX).float()
            return {"input_ids": inputs, "labels": whole, "weights": weights, "positions": positions}
        return {"input_ids": inputs, "labels": labels, "positions": positions}

    @staticmethod
    def real(index: int) -> int:
        """The tokens of sample ``index``; not all but one, because a single token may be the last of a text."""
        return 3 + 7 * index % (LENGTH - 4)


class ByKey(Loads):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset, self.val_dataset = Rows(), None


class ByDocument(Loads):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = type("Documents", (Rows,), {"kind": "document"})()


class ByWeight(Loads):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = type("Weighted", (Rows,), {"kind": "weight"})()


def test_a_weight_of_0_is_as_good_as_an_ignored_label(ranks: Pools, tmp_path: Path) -> None:
    flags = (*MOE, "--max_steps", 3, "--moe_z_loss_coef", 0.1, "--moe_aux_loss_coef", 1)
    ignored, weighted = (ranks(1).run(train, cls, tmp_path / cls.__name__, *flags) for cls in (ByDocument, ByWeight))
    assert totals(weighted)[0] == totals(ignored)[0]
    for name in ("moe_balance", "moe_z", "grad_norm"):
        pairs = [(a[name], b[name]) for a, b in zip(ignored[0].records, weighted[0].records, strict=True) if name in a]
        assert pairs
        assert all(one == pytest.approx(other, rel=1e-5) for one, other in pairs), name


@pytest.mark.parametrize("trainer", [ByKey, ByDocument])
@pytest.mark.parametrize(("world", "sep"), [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.sample(4)
def test_data_of_ones_own_says_what_is_padding(
    ranks: Pools, tmp_path: Path, trainer: type[Loads], world: int, sep: int
) -> None:
    flags = (*MOE, "--max_steps", 3, "--sep_size", sep)
    load, targets = totals(ranks(world).run(train, trainer, tmp_path, *flags))
    real = [Rows.real(index) for index in range(24)]
    assert [sum(of_layer) for of_layer in load] == [K * sum(real)] * len(load)
    assert targets == sum(n - n // 2 for n in real)


def test_a_label_on_padding_is_one_line() -> None:
    ids = torch.ones(1, 4, dtype=torch.int64)
    batch = Batch(ids, ids, padding=torch.tensor([[False, False, True, True]]))
    with pytest.raises(DataError, match=says("... 2 tokens with a label as padding ... -100 ...")):
        check_batch(batch, 4, 7)


class Plain(torch.nn.Module):
    """A dense model that knows nothing of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = torch.nn.Embedding(61, 8), torch.nn.Linear(8, 61, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> LossSums:
        return fused_linear_cross_entropy(self.table(input_ids).flatten(0, 1), self.head.weight, labels.flatten())


class Dense(ByKey):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = self.val_dataset = Rows()

    def _init_model(self, config: Config) -> None:
        self.raw_model = self.model = Plain()

    def _end_step(self) -> None:
        self.loads = [torch.zeros(1)]


def test_a_model_without_experts_is_not_told(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--max_steps", 1, "--do_val", "--no-do_save", "--batch_size", 1, "--max_eval_tokens", 5 * LENGTH)
    (run,) = ranks(2).run(train, Dense, tmp_path, *flags)[:1]
    assert run.records[-1]["stage"] == "val"


class Counted(Trainer):
    """Adds a value with a count of its own: the mean token id without padding; and one without."""

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset, self.val_dataset = Rows(), MockDataset(7, LENGTH, 61, 1)

    def _loss(self, batch: Batch) -> LossSums:
        sums = super()._loss(batch)
        ids = batch.input_ids if batch.padding is None else batch.input_ids * ~batch.padding
        aux = {**sums.aux, "mean_id": ids.sum(), "mean_label": batch.labels.clamp(min=0).sum()}
        return sums._replace(aux=aux, counts={**sums.counts, "mean_id": batch.tokens()})


@pytest.mark.parametrize(("world", "sep"), [(1, 1), (2, 1), (2, 2)])
def test_a_value_is_divided_by_its_own_count(ranks: Pools, tmp_path: Path, world: int, sep: int) -> None:
    """In training and in validation, whose seven samples do not fill whole batches."""
    flags = (*MOE, "--max_steps", 3, "--do_val", "--batch_size", 2, "--log_every", 1, "--sep_size", sep)
    *steps, val = ranks(world).run(train, Counted, tmp_path / "run", *flags)[0].records
    sampler = GlobalBatchSampler(ShuffledEpochs(24, 1337), global_batch=8, micro_batch=1, dp_rank=0, dp_size=1)
    for number, step in enumerate(steps):
        numbers = sampler.samples_of_step(number)
        ids, labels = (torch.stack([Rows()[i][name] for i in numbers]) for name in ("input_ids", "labels"))
        assert step["mean_id"] == pytest.approx(int(ids.sum()) / sum(map(Rows.real, numbers)))
        assert step["mean_label"] == pytest.approx(float(labels[labels != IGNORE_INDEX].double().mean()))
    ids = torch.stack([sample["input_ids"] for sample in MockDataset(7, LENGTH, 61, 1)])
    assert val["mean_id"] == pytest.approx(float(ids.double().mean()))
    whole = ranks(1).run(train, Counted, tmp_path / "whole", *flags[:-2], "--batch_size", 1)[0].records[-1]
    for name in ("loss", "moe_balance", "moe_z"):
        assert val[name] == pytest.approx(whole[name], rel=1e-9)
