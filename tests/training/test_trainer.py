"""The loop: what is logged, validated and saved, when, and of which weights."""

from __future__ import annotations

import gc
import math
import re
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from tests.helpers.errors import says
from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, losses, read_logs, train, user_error
from tests.naive.gpt import Shape, logits
from tinytron.checkpoint import CheckpointFiles
from tinytron.data import Batch, MockDataset
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.training import Config, Trainer
from tinytron.training.datasets import MOCK_VAL_OFFSET
from tinytron.training.run import reporter

Pools = Callable[[int], Ranks]
WORLDS = pytest.mark.parametrize("world", [1, 2, 4])
SHAPE = Shape(layers=2, heads=4, kv_heads=2)


class Traced(Trainer):
    """Notes what happens in which order."""

    def _init_logging(self, config: Config) -> None:
        super()._init_logging(config)
        self.events: list[str] = []

    def train_step(self, microbatches: list[Batch]) -> None:
        super().train_step(microbatches)
        self.events.append(f"train {self.step + 1} x{len(microbatches)}")

    def eval(self) -> float:
        self.events.append(f"val {self.step}")
        return super().eval()

    def save(self) -> CheckpointFiles:
        self.events.append(f"save {self.step}")
        return super().save()

    def report(self) -> list[str]:
        return self.events


# What happens when.


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_every_step_once_and_validation_before_saving(ranks: Pools, tmp_path: Path, log_every: int) -> None:
    flags = ("--max_steps", 5, "--do_val", "--val_every_steps", 2, "--save_every_steps", 3, "--log_every", log_every)
    results = ranks(2).run(train, Traced, tmp_path, *flags)
    for result in results:
        assert result.step == 5
        assert result.extra == [
            *("train 1 x2", "train 2 x2", "val 2", "train 3 x2", "save 3"),
            *("train 4 x2", "val 4", "train 5 x2", "val 5", "save 5"),
        ]
    lines = [line.split()[:2] for line in results[0].log.splitlines()]
    order = ["1 train", "2 train", "2 val", "3 train", "4 train", "4 val", "5 train", "5 val"]
    assert [" ".join(line) for line in lines] == order
    assert [f"{r['step']} {r['stage']}" for r in results[0].records] == order
    assert {p.name for p in results[0].folder.iterdir()} == {
        *("config.json", "log.txt", "log.jsonl", "messages.jsonl", ".lock"),
        *("00003_model.pt", "00003_opt", "00003_meta.pt", "00005_model.pt", "00005_opt", "00005_meta.pt"),
    }


@pytest.mark.parametrize(
    ("flags", "events"),
    [
        (("--debug", "--do_val"), []),
        (("--do_val", "--val_every_steps", 0, "--save_every_steps", 0), ["val 2", "save 2"]),
        (("--no-do_save",), []),
        (("--do_val", "--no-do_save", "--val_every_steps", 1), ["val 1", "val 2"]),
        ((), ["save 2"]),
    ],
    ids=["debug", "only_at_the_end", "no_save", "no_save_but_val", "default"],
)
def test_what_is_switched_off_does_not_happen(
    ranks: Pools, tmp_path: Path, flags: tuple[object, ...], events: list[str]
) -> None:
    (result,) = ranks(1).run(train, Traced, tmp_path, "--max_steps", 2, *flags)
    assert [event for event in result.extra if not event.startswith("train")] == events


def test_steps_follow_from_epochs_unless_given(ranks: Pools, tmp_path: Path) -> None:
    for flags, steps in (
        (("--max_epochs", 1), 4),
        (("--max_epochs", 2), 8),
        (("--max_epochs", 2, "--max_steps", 3), 3),
    ):
        (result,) = ranks(1).run(train, Traced, tmp_path / str(steps), *flags, "--debug")
        assert result.step == steps
        assert list(losses(result.log)) == list(range(1, steps + 1))


def test_the_second_epoch_has_another_order(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--max_epochs", 2, "--debug", "--max_lr", 0, "--min_lr", 0)
    (result,) = ranks(1).run(train, Trainer, tmp_path, *flags)
    found = list(losses(result.log).values())  # with frozen weights a loss identifies its samples
    assert len(set(found)) == 8
    assert sum(found[:4]) == pytest.approx(sum(found[4:]), rel=1e-6)


# The numbers.


@pytest.mark.parametrize("flags", [("--max_steps", 6), ("--max_steps", 6, "--total_batch_size", 192)])
def test_worlds_log_the_same(ranks: Pools, tmp_path: Path, flags: tuple[object, ...]) -> None:
    flags = (*flags, "--do_val", "--val_every_steps", 2)
    logs = [ranks(w).run(train, Trainer, tmp_path / str(w), *flags)[0].log for w in (1, 2, 4)]
    for log in logs:
        assert losses(log) == pytest.approx(losses(logs[0]), rel=1e-5)
        assert losses(log, "val") == pytest.approx(losses(logs[0], "val"), rel=1e-5)
        assert list(losses(log)) == [1, 2, 3, 4, 5, 6]
        assert list(losses(log, "val")) == [2, 4, 6]


def test_the_run_folder_is_the_same_for_every_world_and_micro_batch(ranks: Pools, tmp_path: Path) -> None:
    folders = {ranks(w).run(train, Trainer, tmp_path, "--batch_size", 8 // w, "--debug")[0].folder for w in (1, 2)}
    assert len(folders) == 1
    assert folders.pop().name.startswith("tiny_")


@WORLDS
def test_the_last_validation_is_of_the_saved_weights(ranks: Pools, tmp_path: Path, world: int) -> None:
    """Recomputed from the consolidated weights with plain torch, by the model and by the naive twin."""
    result = ranks(world).run(train, Trainer, tmp_path, "--do_val", "--max_steps", 3)[0]
    weights = torch.load(result.folder / "00003_model.pt", weights_only=True)
    model = GPT(config_of(*TINY).model, seed=99)
    model.load_state_dict(weights)
    samples = [MockDataset(3, 12, 61, seed=1337, offset=MOCK_VAL_OFFSET)[i] for i in range(3)]
    ids, labels = (torch.stack([sample[key] for sample in samples]) for key in ("input_ids", "labels"))
    logged = losses(result.log, "val")[3]
    for values in (model(ids), logits(weights, ids, SHAPE)):
        assert F.cross_entropy(values.flatten(0, 1), labels.flatten()).item() == pytest.approx(logged, rel=1e-6)
    expected = {"loss": pytest.approx(logged), "perplexity": pytest.approx(math.exp(logged)), "tokens": 36}
    expected["accuracy"] = pytest.approx(float((model(ids).argmax(-1) == labels).double().mean()))
    assert result.records[-1] == {"step": 3, "stage": "val", **expected}


def test_log_lines_have_the_documented_form(ranks: Pools, tmp_path: Path) -> None:
    (result,) = ranks(1).run(train, Trainer, tmp_path, "--do_val", "--max_steps", 1)
    assert result.log.splitlines() == [
        f"1 {stage} {loss:#.10g}"
        for stage, loss in (("train", losses(result.log)[1]), ("val", losses(result.log, "val")[1]))
    ]
    names = {
        "step",
        "stage",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "skipped_steps",
        "phases",
        "peak_memory_gib",
    }
    assert set(result.records[0]) == names | {"peak_memory_gib"}


def test_the_learning_rate_is_logged_as_scheduled(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--max_steps", 5, "--max_lr", 0.01, "--min_lr", 0.001, "--warmup_steps", 2, "--debug")
    (result,) = ranks(1).run(train, Trainer, tmp_path, *flags)
    assert [record["lr"] for record in result.records] == pytest.approx([0.005, 0.01, 0.01, 0.0055, 0.001])


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        (("--max_steps", 5, "--warmup_start", 0.25), [0.0025, 0.00625, 0.01, 0.0055, 0.001]),
        (
            ("--lr_schedule", "cosine_rewarm", "--lr_stages", 0.5, "--rewarm_lr", 0.004, "--max_steps", 10),
            [0.005, 0.01, 0.01, 0.0055, 0.001, 0.002, 0.004, 0.004, 0.0025, 0.001],
        ),
    ],
)
def test_warm_ups_and_stages_are_in_the_log(
    ranks: Pools, tmp_path: Path, flags: tuple[object, ...], rates: list[float]
) -> None:
    """The first step, the end of the warm-up, the boundary between stages and the last step."""
    flags = (*flags, "--max_lr", 0.01, "--min_lr", 0.001, "--warmup_steps", 2, "--log_every", 1, "--no-do_save")
    (result,) = ranks(1).run(train, Trainer, tmp_path, *flags)
    assert [record["lr"] for record in result.records] == pytest.approx(rates)


# Validation.


class Uneven(Dataset[dict[str, torch.Tensor]]):
    """Samples with different numbers of valid targets: their losses must be weighted by tokens."""

    def __init__(self, count: int) -> None:
        random = torch.Generator().manual_seed(count)
        self.tokens = torch.randint(61, (count, 13), generator=random)
        self.labels = self.tokens[:, 1:].clone()
        for number, row in enumerate(self.labels):
            row[(5 * number) % 13 :] = -100  # the first sample has none

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index, :-1], "labels": self.labels[index]}


class UnevenValidation(Trainer):
    """Seven samples: on four ranks with micro-batches of two, one rank has nothing but padding."""

    def _init_dataset(self, config: Config) -> None:
        super()._init_dataset(config)
        self.val_dataset = Uneven(7)

    def report(self) -> Any:
        return self.raw_model.state_dict()["wte.weight"].numpy(), self.one_step_results["val_loss"]


@WORLDS
def test_validation_weights_tokens_and_counts_no_sample_twice(ranks: Pools, tmp_path: Path, world: int) -> None:
    results = ranks(world).run(train, UnevenValidation, tmp_path, "--do_val", "--max_steps", 2)
    weights = torch.load(results[0].folder / "00002_model.pt", weights_only=True)
    data = Uneven(7)
    expected = F.cross_entropy(logits(weights, data.tokens[:, :-1], SHAPE).flatten(0, 1), data.labels.flatten())
    assert losses(results[0].log, "val")[2] == pytest.approx(expected.item(), rel=1e-6)
    assert results[0].records[-1]["tokens"] == int((data.labels != -100).sum())
    assert {result.extra[1] for result in results} == {results[0].extra[1]}


class _WithoutTargets(Trainer):
    """No sample of the steps 1 and 2, and none of validation, has a target."""

    def _init_dataset(self, config: Config) -> None:
        super()._init_dataset(config)
        self.val_dataset = Uneven(1)

    def _loss(self, batch: Batch) -> LossSums:
        masked = self.model.training and self.step < 2
        return super()._loss(batch._replace(labels=torch.full_like(batch.labels, -100)) if masked else batch)

    def _normalizer(self, batch: Batch) -> torch.Tensor:
        return batch.targets() * (self.step >= 2 or not self.model.training)


@pytest.mark.parametrize("world", [1, 2])
def test_a_mean_over_no_target_is_not_the_best_loss_of_all(ranks: Pools, tmp_path: Path, world: int) -> None:
    flags = ("--do_val", "--val_every_steps", 2, "--max_steps", 4, "--save_every_steps", 2, "--keep_last", 0)
    result = ranks(world).run(train, _WithoutTargets, tmp_path, *flags)[0]
    found = losses(result.log)
    assert [math.isnan(found[step]) for step in (1, 2, 3, 4)] == [True, True, False, False]
    assert [math.isnan(loss) for loss in losses(result.log, "val").values()] == [True, True]
    assert {record["perplexity"] for record in result.records if record["stage"] == "val"} == {"nan"}
    weights = torch.load(result.folder / "00004_model.pt", weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


class _DropoutSeen(Trainer):
    def _loss(self, batch: Batch) -> LossSums:
        self.modes = (*getattr(self, "modes", ()), self.model.training)
        return super()._loss(batch)

    def report(self) -> tuple[bool, ...]:
        return self.modes


def test_dropout_is_off_in_validation_and_on_again_afterwards(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--do_val", "--val_every_steps", 1, "--max_steps", 2, "--batch_size", 8, "--dropout", 0.5)
    (result,) = ranks(1).run(train, _DropoutSeen, tmp_path, *flags)
    assert result.extra == (True, False, True, False)


def _evaluate_untrained(log_dir: Path) -> tuple[float, float, str]:
    trainer = Trainer(config_of(*TINY, "--log_dir", log_dir, "--do_val"))
    first = trainer.eval()
    trainer.save()
    trainer.train()
    return first, trainer.eval(), (trainer.log_dir / "log.txt").read_text()


def test_eval_and_save_may_be_called_without_training(ranks: Pools, tmp_path: Path) -> None:
    (first, last, log), (other_first, other_last, _) = ranks(2).run(_evaluate_untrained, tmp_path)
    assert (first, last) == (other_first, other_last)
    assert first != last
    values = [(line.split()[0], float(line.split()[2])) for line in log.splitlines() if "val" in line]
    by_hand = ("4", pytest.approx(last))
    assert values == [("0", pytest.approx(first)), by_hand, by_hand]  # the second one by train itself


def _what_stays(log_dir: Path) -> list[str]:
    trainer = Trainer(config_of(*TINY, "--log_dir", log_dir, "--do_val", "--precision", "bf16"))
    trainer.train()
    parts = {
        "trainer": trainer, "model": trainer.raw_model, "optimizer": trainer.optimizer,
        "buffer": trainer.optimizer.buffers[0],
    }  # fmt: skip
    left = {name: weakref.ref(part) for name, part in parts.items()}
    del trainer, parts
    gc.collect()
    return [name for name, reference in left.items() if reference() is not None]


def test_a_trainer_that_is_let_go_frees_its_memory(ranks: Pools, tmp_path: Path) -> None:
    """Several runs in one process, as in a notebook: hooks on parameters must not keep the first one alive."""
    assert ranks(2).run(_what_stays, tmp_path) == [[], []]


# Throughput.


class _SlowPauses(Trainer):
    """Validation and saving take 0.15 s each, steps next to nothing."""

    def _loss(self, batch: Batch) -> LossSums:
        if not self.model.training:
            time.sleep(0.15)
        return super()._loss(batch)

    def _init_dataset(self, config: Config) -> None:
        super()._init_dataset(config)
        original = self.train_dataset.fingerprint  # type: ignore[attr-defined]

        def slow() -> str:
            time.sleep(0.15)
            return str(original())

        self.train_dataset.fingerprint = slow  # type: ignore[attr-defined]


def test_tokens_per_second_exclude_validation_and_saving(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--do_val", "--val_every_steps", 1, "--save_every_steps", 1, "--max_steps", 4, "--batch_size", 8)
    (result,) = ranks(1).run(train, _SlowPauses, tmp_path, *flags)
    rates = [record["tokens_per_second"] for record in result.records if record["stage"] == "train"]
    assert sorted(rates)[2] > 96 / 0.2, "a step of 96 tokens took as long as the pauses"


# Errors.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch_size", 3), r"ConfigError: --total_batch_size 96 .* 3 x 12 x 2 = 72; use a --batch_size of"),
        (
            ("--total_batch_size", 960, "--batch_size", 1),
            "ConfigError: 1 epochs of 32 samples do not fill one global batch",
        ),
    ],
)
def test_errors_are_the_same_on_every_rank(
    ranks: Pools, tmp_path: Path, flags: tuple[object, ...], message: str
) -> None:
    first, second = ranks(2).run(user_error, Trainer, tmp_path, *flags)
    assert first == second
    assert re.match(message, first)


def _on_a_busy_machine(log_dir: Path) -> tuple[list[float], list[str]]:
    """MFU by step, and lines about it, of a run whose peak was measured far too low."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporter, "measure_peak", lambda config, state: (1e3, []))
        trainer = Trainer(config_of(*TINY, "--log_dir", log_dir, "--max_steps", 6, "--log_every", 1))
        patch.setattr(trainer.reporter, "say", lambda *texts: said.extend(texts))
        trainer.train()
    return [r["mfu"] for r in read_logs(trainer.log_dir)[1]], [text for text in said if "MFU" in text]


def test_mfu_is_never_above_one(ranks: Pools, tmp_path: Path) -> None:
    ((mfu, said),) = ranks(1).run(_on_a_busy_machine, tmp_path)
    assert mfu[0] == 1.0  # the first step set the peak
    assert all(0 < value <= 1.0 for value in mfu)
    assert len(mfu) == 6
    (line,) = said
    assert re.match(says("training reached ... TFLOP/s, more than the peak of 1e-09 ..."), line)
