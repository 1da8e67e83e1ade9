"""Evaluations during training with the current weights: loss on validation data, and tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from tinytron.data import Batch
from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.agreement import agree
from tinytron.distributed.parallel_state import ParallelState
from tinytron.evaluation import validate
from tinytron.evaluation.choices import Item, Row, encode_items, log_probs, read_items, summarize
from tinytron.model.modules.loss import LossSums
from tinytron.registry import EVALUATIONS
from tinytron.text.run_tokenizer import find_tokenizer
from tinytron.text.token_bytes import token_bytes_of_data
from tinytron.training.config import Config
from tinytron.training.datasets import LoadedData


class Task(NamedTuple):
    """A task file: its name without suffix, its items, and their tokens."""

    name: str
    items: list[Item]
    rows: list[Row]


class TrainingEvals:
    """Validates on ``val`` and answers the tasks of ``--eval_tasks`` (none in a trial run). Construction is collective.

    ``text_bytes_V`` is the number of bytes of every token id, int64 on the device, if ``val`` reads token shards with a
    tokenizer.json next to them; then validation also reports bits per byte. Raises: DataError or ConfigError on every rank
    for a damaged tokenizer.json, for malformed task files, and for tasks without a tokenizer that fits the model.
    """

    def __init__(self, config: Config, state: ParallelState, val: LoadedData | None) -> None:
        self._config, self._state = config, state
        self._sources = [] if val is None else val.sources
        self._last: tuple[int, float] | None = None  # step and loss of the last validation
        self._path = None if config.data.use_mock_data else config.data.dataset_path
        group = state.groups["world"]
        found = agree(self._token_bytes, group) if val is not None and val.from_shards else None
        size = config.model.vocab_size
        self.text_bytes_V = None if found is None else torch.tensor((found + [0] * size)[:size], device=state.device)
        self.tasks: list[Task] = []
        named = config.train.eval_tasks if not config.train.debug else ()
        # Names of registered evaluations, which the trainer runs; a file of that name comes first.
        self.registered = [name for name in named if not Path(name).exists() and name in EVALUATIONS]
        self._files = [Path(name) for name in named if name not in self.registered]
        if self._files:
            self.tasks = agree(self._read_tasks, group)

    def _token_bytes(self) -> list[int] | None:
        return token_bytes_of_data(self._path)

    def _read_tasks(self) -> list[Task]:
        train, data = self._config.train, self._config.data
        given = None if train.eval_tokenizer is None else Path(train.eval_tokenizer)
        tokenizer = find_tokenizer(self._path, given, data.eot_id, data.eot_position, option="--eval_tokenizer")
        tokenizer.check(self._config.model.vocab_size)
        files = [(path.stem, read_items(path)) for path in self._files]
        return [Task(name, items, encode_items(items, tokenizer, train.seq_len)) for name, items in files]

    def remember(self, step: int, loss: float) -> None:
        """``loss`` is the result of the validation after ``step``, which decides which checkpoint is the best."""
        self._last = step, loss

    def validate(
        self,
        step: int,
        model: nn.Module,
        loss: Callable[[Batch], LossSums],
        normalizer: Callable[[Batch], torch.Tensor],
        batches: Iterable[Batch],
    ) -> tuple[float, dict[str, Any]]:
        """The loss of ``step``'s weights, in nats per token, and the record for the log. Collective."""
        result = validate(model, loss, batches, self._state, self._sources, self.text_bytes_V, normalizer=normalizer)
        self.remember(step, result.loss)
        return result.loss, {"step": step, "stage": "val", **result.fields()}

    def averaged(
        self,
        optimizer: DistributedOptimizer,
        model: nn.Module,
        loss: Callable[[Batch], LossSums],
        normalizer: Callable[[Batch], torch.Tensor],
        batches: Iterable[Batch],
    ) -> dict[str, float]:
        """The loss of the averaged weights (``--ema_decay``), for the record of ``validate``; empty without averages.
        Collective."""
        if not optimizer.options.ema_decay:
            return {}
        with optimizer.averaged():
            result = validate(model, loss, batches, self._state, self._sources, normalizer=normalizer)
        return {"ema_loss": result.loss}

    def loss_of(self, step: int) -> float | None:
        """The validation loss of ``step``'s weights, if the last validation was at that step."""
        return self._last[1] if self._last is not None and self._last[0] == step else None

    def answer(self, step: int, model: nn.Module, loss: Callable[[Batch], LossSums]) -> list[dict[str, Any]]:
        """The accuracies of every task, as records for the log. Collective. A batch has as many tokens as a micro-batch of
        one rank, and at least one row."""
        train, entries = self._config.train, []
        for task in self.tasks:
            scores = log_probs(
                model,
                loss,
                task.rows,
                longest=train.seq_len,
                tokens_per_batch=train.batch_size * train.seq_len,
                device=self._state.device,
                state=self._state,
            )
            result = summarize(task.items, task.rows, scores)
            entries.append({"step": step, "stage": "eval", "task": task.name, **result})
        return entries
