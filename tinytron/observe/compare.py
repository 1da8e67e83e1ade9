"""Results of several runs next to each other: their options that differ, losses and speed, and the best one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinytron.errors import ConfigError
from tinytron.observe.run import Run
from tinytron.observe.table import clean
from tinytron.utils.texts import table

NUMBERS = {
    "step": ",",
    "tokens": ",",
    "loss": ".4f",
    "val_loss": ".4f",
    "best_val_loss": ".4f",
    "tokens_per_second": ",.0f",
}
TITLES = {
    "step": "steps",
    "tokens": "tokens",
    "loss": "loss",
    "val_loss": "val loss",
    "best_val_loss": "best val",
    "tokens_per_second": "tok/s",
}
_NAMES = ("logging.exp_name", "logging.log_dir", "logging.wandb_run_name")  # names of runs, which always differ
# Runs that differ in these predict other tokens.
_MEASURE = ("data.dataset_path", "data.val_dataset_path", "train.seq_len", "train.max_eval_tokens", "train.split_rate")


def read_all(runs: Sequence[Run]) -> Sequence[Run]:
    """The runs, read. Raises: ConfigError for one that cannot be read."""
    for run in runs:
        run.refresh()
        if run.problem:
            raise ConfigError(f"{run.folder.name} cannot be read: {run.problem}; give a run folder such as log/<run>")
    return runs


def differences(runs: Sequence[Run]) -> list[str]:
    """The names of the options that are not the same in all runs, such as ``optim.max_lr``."""
    configs = [run.config for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    return [n for n in names if n not in _NAMES and len({config.get(n) for config in configs}) > 1]


def results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each run (refreshed by the caller): its name, state, numbers (``None``: unknown) and differing options."""
    options = differences(runs)
    rows = []
    for run in runs:
        summary = run.summary()
        numbers = {name: summary[name] for name in NUMBERS}
        chosen = {name: run.config.get(name) for name in options}
        rows.append({"run": run.name, "state": summary["state"], **numbers, "options": chosen})
    return rows


def best(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The name of the best run, and the number by which it is: the lowest validation loss if every run that has a loss was
    validated, else the lowest last training loss. ``None`` if no run has a loss."""
    begun = [row for row in rows if row["loss"] is not None]
    validated = [row for row in begun if row["best_val_loss"] is not None]
    key = "best_val_loss" if validated and len(validated) == len(begun) else "loss"
    if not begun:
        return None
    return min(begun, key=lambda row: float(row[key]))["run"], key


def as_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as a table, and a line that names the best run and says what its loss can be compared with."""
    options = list(rows[0]["options"])
    cells = [["run", *(name.split(".", 1)[-1] for name in options), "state", *TITLES.values()]]
    for row in rows:
        chosen = [clean("-" if value is None else value) for value in row["options"].values()]
        numbers = ["-" if row[name] is None else format(row[name], form) for name, form in NUMBERS.items()]
        cells.append([clean(row["run"]), *chosen, row["state"], *numbers])
    first = len(options) + 2
    lines = table(cells, right=range(first, first + len(NUMBERS)))
    found = best(rows)
    if found is None:
        return [*lines, "", "no run has a loss yet"]
    name, key = found
    (value,) = {row[key] for row in rows if row["run"] == name}
    what = "validation loss" if key == "best_val_loss" else "last training loss"
    lines += ["", f"best: {clean(name)} ({what} {value:.4f})"]
    if key == "loss" and any(row["best_val_loss"] is not None for row in rows):
        lines.append("not every run was validated, so the last training losses decide")
    if other := [name for name in _MEASURE if name in options]:
        lines.append(f"the runs differ in {', '.join(other)}: their losses may be of different tokens")
    return lines
