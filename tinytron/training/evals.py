"""Evaluations during training with the current weights: loss on validation data, and tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from tinytron.data import Batch
from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.agreement import agree, agree_slowly
from tinytron.distributed.parallel_state import ParallelState
from tinytron.evaluation import Evaluation, validate
from tinytron.evaluation.kinds import ChoiceFile
from tinytron.evaluation.named import find_evaluation, is_registered
from tinytron.evaluation.subject import Subject
from tinytron.model.modules.loss import LossSums
from tinytron.text.run_tokenizer import find_tokenizer
from tinytron.text.token_bytes import token_bytes_of_data
from tinytron.training.config import Config
from tinytron.training.datasets import LoadedData
from tinytron.training.run.best import LOSS, BestMetric


class TrainingEvals:
    """Validates on ``val`` and runs the evaluations of ``--eval_tasks`` (none in a trial run). Construction is collective.

    ``text_bytes_V`` is the number of bytes of every token id, int64 on the device, if ``val`` reads token shards with a
    tokenizer.json next to them; then validation also reports bits per byte. Raises: DataError or ConfigError on every rank
    for a damaged tokenizer.json, for malformed task files or missing data, and for evaluations without a tokenizer that
    fits the model.
    """

    def __init__(
        self, config: Config, state: ParallelState, val: LoadedData | None, own: AbstractSet[str] = frozenset()
    ) -> None:
        self._config, self._state = config, state
        self._sources = [] if val is None else val.sources
        self._last: tuple[int, float] | None = None  # step and loss of the last validation
        self._path = None if config.data.use_mock_data else config.data.dataset_path
        group = state.groups["world"]
        found = agree(self._token_bytes, group) if val is not None and val.from_shards else None
        size = config.model.vocab_size
        self.text_bytes_V = None if found is None else torch.tensor((found + [0] * size)[:size], device=state.device)
        named = config.train.eval_tasks if not config.train.debug else ()
        together = agree_slowly if any(map(is_registered, named)) else agree  # their data may have to be downloaded
        self.tasks: list[Evaluation] = []
        self.registered: list[str] = []  # functions, which the trainer calls
        if named:
            self.tasks, self.registered = together(lambda: self._find(named), group)
        names = [*(task.name for task in self.tasks), *self.registered]
        self._best = BestMetric(config.ckpt.best_metric, self._numbers_of_validation(own), names, own)

    def _numbers_of_validation(self, own: AbstractSet[str]) -> list[str]:
        """The numbers that every validation logs. An objective of its ``own`` may log others, which are not known yet."""
        if not self._config.train.do_val or self._config.train.debug:
            return []
        routing = ("moe_balance", "moe_z") if self._config.model.use_moe else ()
        accuracy = [] if "val" in own else ["accuracy"]
        averages = ["ema_loss"] if self._config.optim.ema_decay else []
        bits = ["bits_per_byte"] if self.text_bytes_V is not None else []
        return [LOSS, "perplexity", *accuracy, *averages, *bits, *routing]

    def _token_bytes(self) -> list[int] | None:
        return token_bytes_of_data(self._path)

    def _find(self, names: Sequence[str]) -> tuple[list[Evaluation], list[str]]:
        """The evaluations among ``names``, prepared, and the names of functions."""
        train, data = self._config.train, self._config.data
        data_dir = None if train.eval_data_dir is None else Path(train.eval_data_dir)
        length = -1 if train.eval_length is None else train.eval_length
        found = {name: find_evaluation(name, length, data_dir) for name in names}
        evaluations = [made for made in found.values() if made is not None]
        if evaluations:
            given = None if train.eval_tokenizer is None else Path(train.eval_tokenizer)
            tokenizer = find_tokenizer(self._path, given, data.eot_id, data.eot_position, option="--eval_tokenizer")
            tokenizer.check(self._config.model.vocab_size)
            self._tokenizer = tokenizer
            for made in evaluations:
                made.prepare(tokenizer, train.seq_len)
        return evaluations, [name for name, made in found.items() if made is None]

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

    def noted(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``records`` of the current weights, after taking the value of ``--best_metric`` from them. Collective. Raises:
        ConfigError, on every rank, if there is none."""
        if self._best.name != LOSS:
            agree(lambda: self._best.note(records), self._state.groups["world"])
        return records

    def about(self, step: int) -> dict[str, Any]:
        """Facts about ``step``'s weights for the record of a checkpoint: the validation loss, if the last validation was at
        that step, and the value of ``--best_metric``."""
        known = self._last is not None and self._last[0] == step
        return {"val_loss": self._last[1] if self._last and known else None, "best_metric": self._best.at(step)}

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

    def answer(self, step: int, model: nn.Module, loss: Callable[[Batch], LossSums]) -> list[dict[str, Any]]:
        """The results of every evaluation with the current weights, as records for the log. Collective. A batch has as
        many tokens as a micro-batch of one rank, and at least one row."""
        if not self.tasks:
            return []
        train, state = self._config.train, self._state
        tokens = train.batch_size * train.seq_len
        subject = Subject(model, self._tokenizer, train.seq_len, tokens, state.device, state, loss)
        entries = []
        for task in self.tasks:
            result = task.evaluate(subject)
            scores = result.more if isinstance(task, ChoiceFile) else result.fields()
            entries.append({"step": step, "stage": "eval", "task": task.name, **scores})
        return entries
