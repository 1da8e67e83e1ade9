"""What a run is measured by beside its loss: bits per byte of validation, and tasks on the current weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from tinytron.data import Batch
from tinytron.data.run_tokenizer import find_tokenizer
from tinytron.data.token_bytes import token_bytes_of_data
from tinytron.distributed.collectives import together
from tinytron.distributed.parallel_state import ParallelState
from tinytron.evaluation.choices import Item, Row, encode_items, log_probs, read_items, summarise
from tinytron.model.modules.loss import LossSums
from tinytron.training import datasets
from tinytron.training.config import Config


class Task(NamedTuple):
    """A task file: its name without suffix, its items, and their tokens."""

    name: str
    items: list[Item]
    rows: list[Row]


def text_bytes(config: Config, state: ParallelState, dataset: Dataset[Any] | None) -> torch.Tensor | None:
    """The bytes of every token id, int64 ``[V]`` on the device, if ``dataset`` is of token shards with a tokenizer.json
    beside them that tells. Collective. Raises: DataError on every rank for a damaged one."""
    path, size = config.data.dataset_path, config.model.vocab_size
    if config.data.use_mock_data or path is None or not datasets.checks_its_tokens(dataset):
        return None
    found = together(lambda: token_bytes_of_data(path), state.groups["world"])
    if found is None:
        return None
    return torch.tensor((found + [0] * size)[:size], device=state.device)


def read_tasks(config: Config, state: ParallelState) -> list[Task]:
    """The tasks of ``--eval_tasks``, none in a trial run. Collective. Raises: DataError or ConfigError on every rank for
    files that are not of the form, or without a tokenizer that fits the model."""
    paths, data = [Path(name) for name in config.train.eval_tasks], config.data
    if not paths or config.train.debug:
        return []

    def read() -> list[Task]:
        given = None if config.train.eval_tokenizer is None else Path(config.train.eval_tokenizer)
        path = None if data.use_mock_data else data.dataset_path
        tokenizer = find_tokenizer(path, given, data.eot_id, data.eot_position, option="--eval_tokenizer")
        tokenizer.check(config.model.vocab_size)
        read = [(file.stem, read_items(file)) for file in paths]
        return [Task(name, items, encode_items(items, tokenizer, config.train.seq_len)) for name, items in read]

    return together(read, state.groups["world"])


def run_tasks(
    tasks: list[Task],
    model: nn.Module,
    loss: Callable[[Batch], LossSums],
    config: Config,
    state: ParallelState,
) -> list[dict[str, Any]]:
    """The accuracies of every task, as the log keeps them. Collective. A batch has the tokens of a micro-batch of one
    rank, at least one row."""
    entries = []
    for task in tasks:
        scores = log_probs(
            model,
            loss,
            task.rows,
            longest=config.train.seq_len,
            tokens_per_batch=config.train.batch_size * config.train.seq_len,
            device=state.device,
            state=state,
        )
        entries.append({"stage": "eval", "task": task.name, **summarise(task.items, task.rows, scores)})
    return entries


def shown(entry: dict[str, Any]) -> str:
    """A result in a line for people."""
    return (
        f"{entry['task']}: accuracy {entry['accuracy']:.4f} ± {entry['accuracy_stderr']:.4f} "
        f"({entry['accuracy_per_byte']:.4f} per byte) over {entry['items']} items"
    )
