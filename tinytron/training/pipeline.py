"""The data of a run: datasets, validation split, sampler, loaders, and micro-batches on the device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tinytron.data import Batch
from tinytron.data.loader import build_train_loader
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError, DataError
from tinytron.training import datasets
from tinytron.training.batch_preparer import BatchPreparer
from tinytron.training.config import Config
from tinytron.training.datasets import LoadedData
from tinytron.training.derive import TrainingInfo, data_position, derive
from tinytron.utils.batch_sizes import Skips
from tinytron.utils.phases import DATA, during


class DataPipeline:
    """Provides this rank's micro-batches by step, from datasets or from a user's own loaders; builds whatever is missing.

    ``train`` and ``val`` (``None`` without validation data) are the loaders and what is known about them, ``sampler`` is
    the one of a map-style training set, ``info`` has the step counts, ``validates`` says whether the run validates,
    ``skips`` are the data that the run passes over, and ``notes`` are lines to print. Raises: ConfigError or DataError,
    the same on every rank, for data that does not fit.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        *,
        train_dataset: Dataset[Any] | None = None,
        val_dataset: Dataset[Any] | None = None,
        train_loader: Iterable[Any] | None = None,
        val_loader: Iterable[Any] | None = None,
    ) -> None:
        self.config, self.preparer = config, BatchPreparer(config, state)
        self.validates, self.skips = datasets.validates(config), Skips()
        self._goes_to: int | None = None  # the step that `steps` continues with, if not the next one
        if train_dataset is None and train_loader is None:
            raise ConfigError("_init_dataset set no training data; set self.train_dataset or self.train_loader")
        if config.train.spike_action == "rollback":
            _check_readable_again(train_dataset if train_loader is None else train_loader)
        held_out = []
        if val_dataset is None and val_loader is None:
            train_dataset, val_dataset = self._split(train_dataset)
            if val_dataset is not None:
                sizes = datasets.size_of(train_dataset), datasets.size_of(val_dataset)  # type: ignore[arg-type]
                held_out.append(f"no validation data: the last {sizes[1]:,} of {sum(sizes):,} samples are held out")
        epoch = datasets.epoch_size(config, train_dataset, train_loader)
        self.info: TrainingInfo = derive(config, state.layout, epoch)
        self.sampler = None
        ours = train_loader is None
        if train_loader is None:
            self.sampler, train_loader = datasets.make_train_loader(config, state, self.info, train_dataset)
        self.train = LoadedData(train_loader, train_dataset, ours)
        self.val: LoadedData | None = None
        if val_loader is not None:
            self.val = LoadedData(val_loader, val_dataset, ours=False)
        elif val_dataset is not None:
            self.val = LoadedData(datasets.make_val_loader(config, state, val_dataset), val_dataset, ours=True)
        self.notes = [*held_out, *self.info.notes, *datasets.describe(config, train_dataset, self.info)]
        # Maps a step and the run's skips to a string that identifies the data before it.
        self.identity = datasets.identity_of(config, train_loader if train_dataset is None else train_dataset)

    def _split(self, dataset: Dataset[Any] | None) -> tuple[Dataset[Any] | None, Dataset[Any] | None]:
        """Training and validation part of a dataset without validation data, according to the flags."""
        rate = self.config.train.with_derived().split_rate
        assert rate is not None, "with_derived sets it"
        if not self.validates and rate == 1.0:
            return dataset, None
        return datasets.split_off_validation(dataset, rate)

    def steps(self, first: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of one optimizer step at a time, starting at step ``first`` (counted from 0); after
        ``go_back`` it continues at that step."""
        self._goes_to = first
        while (step := self._goes_to) is not None:
            self._goes_to = None
            if self.train.ours:
                source: Any = self.sampler or self.train.loader
                source.start_step, source.skips = step, self.skips
            before = self._micro_batches(self.skips.position(step, self.info.batch_sizes))
            steps = during(DATA, self.preparer.steps(self.train, self.micro_batches_of, step, before))
            with contextlib.closing(steps):
                for microbatches in steps:
                    yield microbatches
                    if self._goes_to is not None:
                        break

    def go_back(self, now: int, to: int, skips: Skips) -> None:
        """Continue with step ``to`` instead of ``now``, on the data that step ``now`` would have had; ``skips`` were those
        of the run at ``to``. Raises: DataError if the data end before the run then."""
        sizes = self.info.batch_sizes
        self.pass_over(skips.going_back(to, self.skips.position(now, sizes), sizes))
        self._goes_to = to

    def pass_over(self, skips: Skips) -> None:
        """Set ``skips``. Raises: DataError if the data end before the run then."""
        last = skips.position(self.info.max_steps, self.info.batch_sizes)
        try:
            datasets.check_enough(self.train.dataset, last)
        except DataError as error:
            count = skips.before(self.info.max_steps) * self.config.train.seq_len
            raise DataError(
                f"{error} (after spikes the run has passed over {count:,} tokens, which count too)"
            ) from error
        self.skips = skips

    def check_again(self) -> None:
        """Raises: ConfigError for data whose order is not ours, which ``again`` cannot read: streams, loaders of the
        user's, and those that a trainer's ``batch`` changes."""
        if self.sampler is None or not isinstance(self.train.loader, DataLoader) or not self.train.ours:
            raise ConfigError(
                "the batches of earlier steps can only be read again from a dataset with __getitem__ and the built-in "
                "loader; leave lagging out of --eval_tasks"
            )

    def again(self, step: int) -> list[Batch]:
        """This rank's micro-batches of ``step`` (counted from 0) again, by the formula of the order. Raises: as
        ``check_again``."""
        self.check_again()
        assert self.train.dataset is not None, "the built-in loader reads one"
        sampler = copy.copy(self.sampler)
        sampler.start_step, sampler.stop_step = step, step + 1  # type: ignore[union-attr]
        loader = build_train_loader(self.train.dataset, sampler, num_workers=0, pin_memory=False)  # type: ignore[arg-type]
        return next(self.preparer.steps(replace(self.train, loader=loader), self.micro_batches_of, step))

    def micro_batches_of(self, step: int) -> int:
        """Micro-batches of this rank in step ``step``."""
        return self._micro_batches(self.info.batch_sizes.at(step))

    def _micro_batches(self, sequences: int) -> int:
        return sequences // (self.config.train.batch_size * self.info.dp_size)

    def tokens_before(self, step: int) -> int:
        """Tokens of all ranks in the first ``step`` steps."""
        return self.position(step)["tokens"]

    def position(self, step: int) -> dict[str, int]:
        """The position in the data after ``step`` steps (``derive.data_position``)."""
        return data_position(self.config, step, self.skips)

    def validation(self) -> Iterator[Batch]:
        """This rank's batches of the validation data, each once."""
        assert self.val is not None, "there must be validation data: set val_dataset or pass --do_val"
        return self.preparer.once(self.val)

    def seen_tokens(self, step: int) -> dict[str, int]:
        """Tokens of every source of a mixture in the first ``step`` steps; empty without a mixture."""
        return datasets.seen_tokens(self.config, self.train.dataset, step, self.skips)


def _check_readable_again(data: Any) -> None:
    """Raises: ConfigError for data that are an iterator, which a run cannot read again from an earlier place."""
    if isinstance(data, Iterator):
        raise ConfigError(
            f"--spike_action rollback reads data again, but a {type(data).__name__} can be read only once; use an object "
            "whose __iter__ starts over, such as a DataLoader, or --spike_action skip"
        )
