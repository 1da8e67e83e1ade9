"""Evaluations of a ``BaseTrainer`` during training, in addition to the validation loss."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinytron.training.trainer import Trainer


class Evaluator:
    """Answers ``--eval_tasks`` with the current weights of ``trainer``. A subclass returns scores of its own."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer: Trainer = weakref.proxy(trainer)  # an ended run must be freed at once: it holds its folder's lock

    @classmethod
    def from_trainer(cls, trainer: Trainer) -> Evaluator:
        """The evaluator of ``trainer``, whose model, groups and options are all set."""
        return cls(trainer)

    def evaluate(self) -> Mapping[str, Mapping[str, Any]]:
        """Scores by name for every task, ``{"my_task": {"accuracy": 0.5}}``. Every rank calls it, and the first one's
        result is logged."""
        trainer = self.trainer
        records = trainer.evals.answer(trainer.step, trainer.model, trainer._loss)
        return {record["task"]: record for record in records}

    def records(self) -> list[dict[str, Any]]:
        """The result of ``evaluate`` for the log."""
        about = {"step": self.trainer.step, "stage": "eval"}
        return [{**scores, **about, "task": task} for task, scores in self.evaluate().items()]
