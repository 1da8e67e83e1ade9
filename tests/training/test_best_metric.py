"""``--best_metric``: which checkpoint is the best, also after a resume and by the commands; names that do not exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, train, user_error
from tinytron.checkpoint import complete_checkpoints
from tinytron.checkpoint.load import read_meta
from tinytron.errors import ConfigError
from tinytron.jobs.checkpoints import best_of
from tinytron.metrics.custom import MeanMetric
from tinytron.registry import evaluation
from tinytron.training import Trainer
from tinytron.training.base import BaseTrainer, BaseTrainerConfig
from tinytron.training.evaluator import Evaluator
from tinytron.training.run.best import BestMetric

Pools = Callable[[int], Ranks]
SCORES = (None, 0.25, 0.75, 0.5, 0.125, 0.0)  # by step
EVERY = ("--max_steps", 4, "--do_val", "--val_every_steps", 1, "--save_every_steps", 1, "--no-async_save")


@evaluation("scripted")
def scripted(trainer: Trainer) -> Mapping[str, Any]:
    return {"score": SCORES[trainer.step], "other": -trainer.step}


@evaluation("scripted_lower")
def scripted_lower(trainer: Trainer) -> Mapping[str, Any]:
    return {"score": SCORES[trainer.step], "higher_is_better": False}


class StepsMetric(MeanMetric):
    """A number of the validation that a user adds."""

    def update(self, outputs: Any, inputs: Mapping[str, Any]) -> None:
        self.add("rows", inputs["labels"].sum() * 0 + 1, 1)


class WithMetric(Trainer):
    eval_metric_cls = StepsMetric


class Scores(Evaluator):
    def evaluate(self) -> Mapping[str, Mapping[str, Any]]:
        return {"mine": {"accuracy": SCORES[self.trainer.step]}}


class WithEvaluator(BaseTrainer[BaseTrainerConfig, Any]):
    def evaluator(self) -> Evaluator:
        return Scores.from_trainer(self)


def _train(cls: type[Trainer], log_dir: Path, *flags: object) -> Run:
    """``train`` in a process that has imported this module, and thus the evaluations."""
    return train(cls, log_dir, *flags)


def _error(cls: type[Trainer], log_dir: Path, *flags: object) -> str:
    return user_error(cls, log_dir, *flags)


def steps(folder: Path) -> list[int]:
    return sorted(files.step for files in complete_checkpoints(folder))


def best(folder: Path) -> int | None:
    found = best_of(complete_checkpoints(folder))
    return None if found is None else found.step


@pytest.mark.parametrize(
    ("cls", "name", "expected"),
    [
        (Trainer, "scripted", 2),
        (Trainer, "scripted/other", 1),
        (Trainer, "scripted_lower", 4),
        (Trainer, "scripted_lower/score", 4),
        (WithEvaluator, "mine", 2),
        (WithEvaluator, "mine/accuracy", 2),
        (WithMetric, "rows", 1),  # always equal: the first
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_the_best_is_by_the_metric(
    ranks: Pools, tmp_path: Path, world: int, cls: type[Trainer], name: str, expected: int
) -> None:
    tasks = ("--eval_tasks", name.split("/")[0], "--eval_every", 1) if name.startswith("scripted") else ()
    tasks = tasks if cls is not WithEvaluator else ("--eval_every", 0)
    flags = (*EVERY, *tasks, "--best_metric", name, "--keep_last", 1, "--keep_best")
    if cls is WithEvaluator:  # evaluates only at the end: no other step is known
        expected = 4
    run: Run = ranks(world).run(_train, cls, tmp_path, *flags)[0]
    assert best(run.folder) == expected
    assert steps(run.folder) == sorted({expected, 4})
    meta = read_meta(complete_checkpoints(run.folder)[-1].meta)
    assert meta.best_metric["name"] == name
    assert meta.val_loss is not None


def test_a_resumed_run_keeps_the_best_so_far(ranks: Pools, tmp_path: Path) -> None:
    tasks = ("--eval_tasks", "scripted", "--eval_every", 1, "--best_metric", "scripted")
    flags = (*EVERY, *tasks, "--keep_last", 1, "--keep_best", "--lr_schedule", "constant")
    whole: Run = ranks(1).run(_train, Trainer, tmp_path / "whole", *flags)[0]
    half: Run = ranks(1).run(_train, Trainer, tmp_path / "half", *flags, "--max_steps", 3)[0]
    assert steps(half.folder) == [2, 3]
    rest: Run = ranks(1).run(_train, Trainer, tmp_path / "half", *flags)[0]
    assert (rest.folder, steps(rest.folder), best(rest.folder)) == (half.folder, [2, 4], 2)
    assert rest.log == whole.log
    more = ("--max_steps", 5, "--best_metric", "loss")  # earlier checkpoints are judged by another metric
    other: Run = ranks(1).run(_train, Trainer, tmp_path / "half", *flags, *more)[0]
    assert (other.folder, steps(other.folder), best(other.folder)) == (half.folder, [5], 5)


def test_steps_that_were_not_evaluated_are_not_the_best(ranks: Pools, tmp_path: Path) -> None:
    tasks = ("--eval_tasks", "scripted", "--eval_every", 3, "--best_metric", "scripted")
    run: Run = ranks(1).run(_train, Trainer, tmp_path, *EVERY, *tasks)[0]
    assert best(run.folder) == 3
    values = {files.step: read_meta(files.meta).best_metric["value"] for files in complete_checkpoints(run.folder)}
    assert values == {1: None, 2: None, 3: 0.5, 4: 0.125}


@pytest.mark.parametrize(
    ("cls", "flags", "text"),
    [
        (
            Trainer,
            (*EVERY, "--best_metric", "acuracy"),
            "--best_metric acuracy is not a number of this run; did you mean",
        ),
        (
            Trainer,
            ("--best_metric", "accuracy"),
            "--best_metric accuracy needs an evaluation; use --do_val, or --eval_tasks",
        ),
        (
            Trainer,
            ("--eval_tasks", "scripted", "--best_metric", "loss"),
            "--best_metric loss is not a number of this run; it has scripted",
        ),
    ],
)
def test_unknown_names_before_training(
    ranks: Pools, tmp_path: Path, cls: type[Trainer], flags: tuple[object, ...], text: str
) -> None:
    for error in ranks(2).run(_error, cls, tmp_path / "log", *flags):
        assert error.startswith("ConfigError: ")
        assert text in error
    assert not (tmp_path / "log").exists()


def test_unknown_names_of_own_numbers_after_the_first_evaluation(ranks: Pools, tmp_path: Path) -> None:
    for cls, name in ((WithMetric, "row"), (WithEvaluator, "mime")):
        flags = (*EVERY, "--best_metric", name)
        for error in ranks(2).run(_error, cls, tmp_path / name, *flags):
            known = "rows" if cls is WithMetric else "mine"
            assert error.startswith(
                f"ConfigError: --best_metric {name} is not a number of this run; did you mean {known}?"
            )


def test_directions_by_name() -> None:
    for name, value in {
        "loss": 1,
        "perplexity": 1,
        "bits_per_byte": 1,
        "my_loss": 1,
        "accuracy": -1,
        "margin": -1,
    }.items():
        metric = BestMetric(name, ["loss", name], [])
        metric.note([{"step": 3, "stage": "val", "loss": 1.0, name: 1.0, "tokens": 5}])
        found = metric.at(3)
        assert found == ({} if name == "loss" else {"name": name, "value": 1.0, "higher_is_better": value < 0})
        assert metric.at(4).get("value") is None
    with pytest.raises(ConfigError, match="it has loss, accuracy, sky"):
        BestMetric("zzz", ["loss", "accuracy"], ["sky"])
    BestMetric("sky/accuracy_per_byte", [], ["sky"])
