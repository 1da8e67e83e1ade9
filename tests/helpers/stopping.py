"""Trainers that stop in the middle, as if the process had died, and tell what state they hold."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.helpers.runs import TINY, Run, config_of, read_logs
from tinytron.training import Trainer


class Died(BaseException):
    """The process is gone: nothing in the library may catch this."""


class StoppingTrainer(Trainer):
    """Dies once ``stop_after`` steps are done and logged, validated and saved as due."""

    stop_after = 0

    def _maybe_save(self) -> None:
        super()._maybe_save()
        if self.step == self.stop_after:
            self.saver.checkpoints.finish()
            raise Died


def run_until(log_dir: Path, stop_after: int, *flags: object, cls: type[StoppingTrainer] = StoppingTrainer) -> Run:
    """Start, resume if there is a checkpoint, die after ``stop_after`` (0: do not). ``extra`` is the state as ``owned``
    gives it. A job for the pool."""
    trainer = type("T", (cls,), {"stop_after": stop_after})(config_of(*TINY, "--log_dir", log_dir, *flags))
    with contextlib.suppress(Died):
        trainer.train()
    extra = owned(trainer)
    if not trainer.master_process:
        return Run(trainer.log_dir, trainer.step, "", [], extra)
    return Run(trainer.log_dir, trainer.step, *read_logs(trainer.log_dir), extra)


def said_until(log_dir: Path, stop_after: int, *flags: object) -> tuple[Run, str]:
    """``run_until``, and what this rank printed. A job for the pool."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = run_until(log_dir, stop_after, *flags)
    return result, said.getvalue()


def plain(value: Any) -> Any:
    """Nested containers with lists for tensors: what ``==`` can compare."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if torch.is_tensor(value) else value


def owned(trainer: Trainer) -> list[tuple[str, int, int, Any]]:
    """This rank's parts of main weights and optimizer states: key, size of the whole, offset, values."""
    parts = []
    for piece in trainer.optimizer.pieces():
        ((first, _),) = piece.runs
        parts.append((f"{piece.name}/main", piece.numel, first, piece.main.detach().numpy().copy()))
        for key, value in trainer.optimizer.inner.state[piece.holder].items():
            if not torch.is_tensor(value):
                continue
            if value.ndim and value.numel() != piece.holder.numel():  # one value per row, say, of an owned matrix
                count, of = value.numel(), len(piece.main)
                parts.append((f"{piece.name}/{key}", piece.numel // of * count, first // of * count, _flat(value)))
                continue
            flat = value.reshape(-1)  # a scalar counts for every element
            own = flat[piece.start : piece.start + len(piece.main)] if value.ndim else flat.expand(len(piece.main))
            parts.append((f"{piece.name}/{key}", piece.numel, first, _flat(own)))
    return parts


def _flat(values: torch.Tensor) -> Any:
    return values.detach().reshape(-1).numpy().copy()


def whole(results: list[Run]) -> dict[str, Any]:
    """The parts of all ranks put together."""
    found: dict[str, Any] = {}
    for result in results:
        for key, numel, offset, values in result.extra:
            found.setdefault(key, np.full(numel, np.nan, values.dtype))[offset : offset + len(values)] = values
    assert not any(np.isnan(values).any() for values in found.values())
    return found
