"""Values derived from the configuration, the number of processes and the size of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tinytron.distributed.layout import ParallelLayout, divisors
from tinytron.errors import ConfigError
from tinytron.optim.schedule import fitting_warmup
from tinytron.training.config import Config, OptimConfig, TrainingConfig
from tinytron.utils.batch_sizes import BatchSizes, Skips
from tinytron.utils.training import get_training_info, grad_accum_steps, round_to


@dataclass(frozen=True)
class TrainingInfo:
    """Values derived from the configuration, the number of processes and the number of training samples. The counts of
    micro-batches and samples are those of a step after any warm-up of the batch (``batch_sizes``)."""

    dp_size: int
    grad_accum_steps: int
    global_batch_samples: int
    batch_sizes: BatchSizes
    max_steps: int
    warmup_steps: int
    profile_window: tuple[int, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Due:
    """Tells which recurring actions are due after a step (counted from 1); after the ``last`` step all of them are."""

    config: Config
    last: int
    answers: bool  # there are tasks to answer

    def validation(self, step: int) -> bool:
        """Validation (``--do_val``)."""
        return self._runs(self.config.train.do_val) and self._every(self.config.train.val_every_steps, step)

    def tasks(self, step: int) -> bool:
        """Answers to ``--eval_tasks``, or a trainer's own evaluation."""
        return self._runs(self.answers) and self._every(self.config.train.eval_every, step)

    def save(self, step: int) -> bool:
        """A checkpoint (``--do_save``)."""
        return self._runs(self.config.ckpt.do_save) and self._every(self.config.ckpt.save_every_steps, step)

    def report(self, step: int) -> bool:
        """A report; one also precedes validation, tasks and saving, to keep the log's lines in order."""
        follows = self.validation(step) or self.tasks(step) or self.save(step)
        return step == 1 or self._every(self.config.logging.log_every, step) or follows

    def _runs(self, wanted: bool) -> bool:
        return wanted and not self.config.train.debug

    def _every(self, interval: int, step: int) -> bool:
        return step == self.last or (interval > 0 and step % interval == 0)


@dataclass(frozen=True)
class DueAtBoundary(Due):
    """Validation and a checkpoint are also due after step ``boundary``."""

    boundary: int

    def validation(self, step: int) -> bool:
        return super().validation(step) or (step == self.boundary and self._runs(self.config.train.do_val))

    def save(self, step: int) -> bool:
        return super().save(step) or (step == self.boundary and self._runs(self.config.ckpt.do_save))


def due_at_boundary(due: Due, info: TrainingInfo, option: str, tokens: int) -> DueAtBoundary:
    """``due`` for a run whose first stage has this many ``tokens``, as ``option`` says. Raises: ConfigError unless the
    first stage is shorter than the run."""
    sizes, length = info.batch_sizes, due.config.train.seq_len
    boundary = sizes.steps_for(-(-tokens // length))
    if boundary >= info.max_steps:
        raise ConfigError(
            f"{option}={tokens} is {boundary} steps, but the run has {info.max_steps}; use at most "
            f"{sizes.before(info.max_steps - 1) * length}"
        )
    return DueAtBoundary(due.config, due.last, due.answers, boundary)


def accumulation_steps(config: Config, layout: ParallelLayout) -> int:
    """Micro-batches per optimizer step after any warm-up of the batch. Raises: ConfigError if a global batch does not
    divide evenly over the ranks."""
    train = config.train
    per_pass = train.batch_size * train.seq_len * layout.dp
    for tokens in train.batch_warmup_sizes:
        if tokens % per_pass:
            raise ConfigError(
                f"--batch_warmup_sizes {tokens} (tokens) must be a multiple of --batch_size x --seq_len x data-parallel "
                f"ranks = {train.batch_size} x {train.seq_len} x {layout.dp} = {per_pass}; use "
                f"{round_to(tokens, per_pass)}, or a smaller --batch_size"
            )
    return grad_accum_steps(train.total_batch_size, train.batch_size, train.seq_len, layout.dp)


def with_fitting_batch(config: Config, layout: ParallelLayout) -> Config:
    """``config`` with, under ``--fit_batch``, the largest micro-batch of at most ``--batch_size`` that divides a rank's
    part of the global batch. Unchanged if that part is not whole sequences, which ``accumulation_steps`` refuses."""
    train = config.train
    sequences, rest = divmod(math.gcd(*train.batch_sizes.sizes()), layout.dp)
    if not train.fit_batch or rest or train.batch_size < 1:
        return config
    size = max(count for count in divisors(sequences) if count <= train.batch_size)
    return replace(config, train=replace(train, batch_size=size))


def derive(config: Config, layout: ParallelLayout, num_samples: int | None) -> TrainingInfo:
    """Resolve steps and accumulation; ``num_samples`` is the length of an epoch, or ``None`` for data without a length.

    Raises: ConfigError if the global batch does not divide evenly over the ranks, the data has less than one global batch,
    or the length of the run is not specified.
    """
    train = config.train
    counts = get_training_info(
        total_batch_size=train.total_batch_size,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        dp_size=layout.dp,
        num_samples=num_samples,
        max_steps=train.max_steps,
        max_train_tokens=train.max_train_tokens,
        max_epochs=train.max_epochs,
    )
    max_steps = _steps(train, num_samples, counts.max_steps)
    notes = _limits_note(train)
    if stages := list(zip(train.batch_warmup_sizes, train.batch_warmup_ends, strict=True)):
        growth = ", ".join(f"{tokens:,} until step {end}" for tokens, end in stages)
        notes.append(f"tokens per step: {growth}, then {train.total_batch_size:,}")
    if config.balanced_sequences is not None:
        sequences = train.batch_size * layout.dp
        notes.append(
            f"--moe_aux_loss_scope batch balances experts over the {sequences} sequences of a micro-batch: a different "
            "--batch_size x data-parallel ranks makes a different run, with its own folder"
        )
    warmup, ratio = config.optim.warmup_steps, config.optim.warmup_ratio
    if ratio:
        warmup = math.ceil(ratio * max_steps)
    elif (fitting := fitting_warmup(warmup, max_steps)) != warmup:
        warmup = fitting
        if config.optim.warmup_steps != OptimConfig.warmup_steps:  # shortening the default needs no note
            notes.append(
                f"warm-up cut from {config.optim.warmup_steps} to {warmup} steps: the run has only {max_steps}"
            )
    first, last = train.steps_to_profile
    if train.use_profiler and last > max_steps:
        first, last = max(1, max_steps - (last - first)), max_steps
        notes.append(f"profiling steps {first} to {last}: the run has only {max_steps}")
    return TrainingInfo(
        dp_size=layout.dp,
        grad_accum_steps=counts.grad_accum_steps,
        global_batch_samples=counts.global_batch_samples,
        batch_sizes=train.batch_sizes,
        max_steps=max_steps,
        warmup_steps=warmup,
        profile_window=(first, last),
        notes=tuple(notes),
    )


def _steps(train: TrainingConfig, num_samples: int | None, constant: int) -> int:
    """Number of steps of the run, from that with a ``constant`` batch."""
    if train.max_steps is not None or not train.batch_warmup_sizes:
        return constant
    if train.max_train_tokens is not None:
        return train.batch_sizes.steps_for(-(-train.max_train_tokens // train.seq_len))
    assert num_samples is not None, "get_training_info raises without a length"
    return train.batch_sizes.steps_within(num_samples * train.max_epochs)


def _limits_note(train: TrainingConfig) -> list[str]:
    """A line that says which limit of the run holds, if several are given."""
    names = ("max_steps", "max_train_tokens", "max_epochs")  # in the order in which they hold
    given = [f"--{name} {value}" for name in names if (value := getattr(train, name)) != getattr(TrainingConfig, name)]
    if len(given) < 2:
        return []
    return [f"the length of the run is {given[0]}, which holds before {' and '.join(given[1:])}"]


def data_position(config: Config, step: int, skips: Skips) -> dict[str, int]:
    """The position of a run in its data after ``step`` steps: the steps; the samples, with those that ``skips`` passes
    over, which determine what follows; and the tokens, without them."""
    sizes = config.train.batch_sizes
    tokens = sizes.before(step) * config.train.seq_len
    return {"step": step, "samples": skips.position(step, sizes), "tokens": tokens}
