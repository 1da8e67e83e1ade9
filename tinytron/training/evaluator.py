"""Evaluations of a ``BaseTrainer`` during training, in addition to the validation loss."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tinytron.errors import ConfigError
from tinytron.registry import EVALUATIONS

if TYPE_CHECKING:
    from tinytron.training.trainer import Trainer


class Evaluator:
    """Evaluates the current weights of ``trainer`` by ``--eval_tasks``. A subclass returns scores of its own."""

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
        records += registered_records(trainer)
        return {record["task"]: record for record in records}

    def records(self) -> list[dict[str, Any]]:
        """The result of ``evaluate`` for the log."""
        about = {"step": self.trainer.step, "stage": "eval"}
        return [{**scores, **about, "task": task} for task, scores in self.evaluate().items()]


def check_registered(trainer: Trainer) -> None:
    """Call ``check(trainer)`` of the registered evaluations that have it, before training. Raises: what they raise."""
    for name in trainer.evals.registered:
        if callable(check := getattr(EVALUATIONS[name], "check", None)):
            check(trainer)


def registered_records(trainer: Trainer) -> list[dict[str, Any]]:
    """For the log, the scores of the evaluations that ``--eval_tasks`` names and ``@evaluation`` registered. Each is called
    with the trainer, on every rank, and returns its scores by name; or it is a class with a method ``evaluate`` that does,
    and possibly a static one ``check(trainer)``, which may refuse a run before it begins.

    Raises: ConfigError for another result.
    """
    found = []
    for name in trainer.evals.registered:
        scores = EVALUATIONS[name](trainer)
        if callable(evaluate := getattr(scores, "evaluate", None)):
            scores = evaluate()
        if not isinstance(scores, Mapping):
            raise ConfigError(
                f"the evaluation {name} returned a {type(scores).__name__}; return scores by name, such as "
                "{'accuracy': 0.5}"
            )
        found.append({**scores, "step": trainer.step, "stage": "eval", "task": name})
    return found
