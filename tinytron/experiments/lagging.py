"""How much of the batches of earlier steps the model still knows: a forgetting curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinytron.errors import ConfigError
from tinytron.evaluation.validate import ACCURACY, validate
from tinytron.registry import evaluation

if TYPE_CHECKING:
    from tinytron.training import Trainer

STEPS_AGO = (0, 1, 4, 16, 64, 256, 1024)


@evaluation("lagging")
class Lagging:
    """Loss and accuracy on the batches trained on 0, 1, 4, 16, 64, 256 and 1,024 steps ago (only during training)."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @staticmethod
    def check(trainer: Trainer) -> None:
        """Raises: ConfigError for data that cannot be read again."""
        if getattr(trainer, "makes_batches", False):
            raise ConfigError(
                "--eval_tasks lagging needs a trainer that trains on the batches of its data, but "
                f"{type(trainer).__name__} makes its own; leave lagging out"
            )
        trainer.data.check_again()

    def evaluate(self) -> dict[str, float]:
        """The numbers, with names that end in ``_back_<steps>``. Collective."""
        trainer, found = self.trainer, {}
        loss, normalizer = trainer._loss, trainer._normalizer
        for ago in STEPS_AGO:
            if (step := trainer.step - 1 - ago) < 0:
                break
            result = validate(trainer.model, loss, trainer.data.again(step), trainer.state, normalizer=normalizer)
            found[f"loss_back_{ago}"] = result.loss
            if ACCURACY in result.aux:
                found[f"{ACCURACY}_back_{ago}"] = result.aux[ACCURACY]
        return found
