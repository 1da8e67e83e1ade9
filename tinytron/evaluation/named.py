"""Evaluations by name: files of multiple-choice items, and registered ones."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from tinytron.errors import ConfigError
from tinytron.evaluation.kinds import ChoiceFile, Evaluation
from tinytron.registry import EVALUATIONS


def is_registered(name: str) -> bool:
    """True if ``name`` is that of a registered evaluation. A file of that name comes first."""
    return name in EVALUATIONS and not Path(name).exists()


def find_evaluation(name: str, length: int = -1, data_dir: Path | None = None) -> Evaluation | None:
    """The evaluation ``name`` with at most ``length`` items (-1: all), whose data may come from ``data_dir``; ``None`` for
    a registered function, which needs a trainer. Raises: DataError for a file that is not one of items; ConfigError for
    an unknown name."""
    if not is_registered(name) and (Path(name).exists() or Path(name).suffix):
        found: Evaluation = ChoiceFile(Path(name))
    else:
        target = EVALUATIONS[name]
        if not (inspect.isclass(target) and issubclass(target, Evaluation)):
            return None
        found = target()
        found.name = found.name or name
    found.length, found.data_dir = length, data_dir
    return found


def find_evaluations(names: Sequence[str], length: int = -1, data_dir: Path | None = None) -> list[Evaluation]:
    """``find_evaluation`` for all ``names``, outside of training. Raises: the same; ConfigError for a function, and for two
    of one name."""
    found = {}
    for name in names:
        made = find_evaluation(name, length, data_dir)
        if made is None:
            raise ConfigError(
                f"the evaluation {name} needs a trainer, so it runs only during training; leave it out, or make it a "
                "subclass of tinytron.evaluation.RolloutEvaluation or another kind"
            )
        if made.name in found:
            raise ConfigError(f"there are two evaluations called {made.name}, and results go by that name; rename one")
        found[made.name] = made
    return list(found.values())
