"""``--best_metric``: the number by which the best checkpoint is found."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from tinytron.errors import ConfigError
from tinytron.utils.flags import nearest

LOSS = "loss"  # the validation loss: the default
_LOWER = ("loss", "perplexity", "ppl", "bits_per_byte")  # suffixes of metrics where lower is better
_MAIN = ("score", "accuracy")  # the number of an evaluation that its name stands for
_ABOUT = ("step", "stage", "task", "time", "tokens", "higher_is_better")
_BUILT_IN = ("tinytron.training.trainer", "tinytron.training.base")
_ADDS = {"val": ("_loss", "forward", "eval"), "eval": ("evaluator", "_answer_tasks")}


def own_stages(trainer: Any) -> set[str]:
    """The stages (``val``, ``eval``) whose records may have numbers of ``trainer``'s own, by what its class overrides."""
    own = [vars(base) for base in type(trainer).__mro__ if base.__module__ not in _BUILT_IN]
    found = {stage for stage, names in _ADDS.items() if any(name in methods for methods in own for name in names)}
    return found | ({"val"} if trainer.eval_metric_cls is not None else set())


class BestMetric:
    """The value of the metric ``name`` after each evaluation of the weights. A name is a number of the validation
    (``accuracy``), an evaluation (``mmlu``), or a number of one (``sky/accuracy_per_byte``).

    ``in_val`` are the known numbers of the validation, empty if there is none; ``evaluations`` are their names, and ``own``
    is as ``own_stages``. Raises: ConfigError for a name that cannot occur.
    """

    def __init__(
        self, name: str | None, in_val: Collection[str], evaluations: Sequence[str], own: AbstractSet[str] = frozenset()
    ) -> None:
        self.name = LOSS if name is None else name
        self._known = [*in_val, *evaluations]
        self._expected = ({"val"} if in_val else set()) | ({"eval"} if evaluations or "eval" in own else set())
        self._last: tuple[int, float, bool] | None = None
        self._seen: set[str] = set()  # stages
        self._found: list[str] = []  # names of numbers
        possible = self.name in self._known or self.name.rpartition("/")[0] in evaluations
        if name is not None and not possible and not own & self._expected:
            raise self._unknown()

    def note(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take the value from ``records`` of the log. Raises: ConfigError if no kind of record has it."""
        for record in records:
            names = _numbers(record)
            self._found += [found for found in names if found not in self._found]
            if self.name in names:
                value, higher = names[self.name]
                self._last = record["step"], value, higher
            self._seen.add(record["stage"])
        if self._last is None and self.name != LOSS and self._seen >= self._expected:
            self._known = self._found
            raise self._unknown()

    def at(self, step: int) -> dict[str, Any]:
        """Name, value and direction for the record of a checkpoint of ``step``; the value is ``None`` if it is not known.
        Empty for the validation loss, which a checkpoint has anyway."""
        if self.name == LOSS:
            return {}
        known = self._last is not None and self._last[0] == step
        value, higher = self._last[1:] if self._last is not None and known else (None, None)
        return {"name": self.name, "value": value, "higher_is_better": higher}

    def _unknown(self) -> ConfigError:
        if not self._known:
            return ConfigError(
                f"--best_metric {self.name} needs an evaluation; use --do_val, or --eval_tasks with its name"
            )
        hint = nearest(self.name, self._known)
        return ConfigError(f"--best_metric {self.name} is not a number of this run{hint}; it has {_list(self._known)}")


def _numbers(record: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
    """The numbers of a record by the names that ``--best_metric`` accepts, and whether higher is better."""
    own = {
        name: float(value)
        for name, value in record.items()
        if name not in _ABOUT and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    if record["stage"] == "val":
        return {name: (value, _higher(name)) for name, value in own.items()}
    task = record["task"]
    main = next((name for name in _MAIN if name in own), next(iter(own)) if len(own) == 1 else None)
    found = {f"{task}/{name}": (value, _higher(name)) for name, value in own.items()}
    if main is not None:
        higher = bool(record.get("higher_is_better", _higher(main)))
        found = {task: (own[main], higher), **found, f"{task}/{main}": (own[main], higher)}
    return found


def _higher(name: str) -> bool:
    return not name.endswith(_LOWER)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:20])
