"""Turns a loader's batches into micro-batches on the device: checked, cut to this rank's part of the sequences, pinned."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tinytron.data import Batch
from tinytron.data.batch import FIELDS, as_batch, split_rows
from tinytron.data.passes import endless, one_pass
from tinytron.data.prefetch import prefetched
from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.sequence_parallel.ulysses import cut_sequence
from tinytron.errors import DataError
from tinytron.training.config import Config
from tinytron.training.datasets import LoadedData
from tinytron.utils.sequences import IGNORE_INDEX, documents_of, documents_without_target


class BatchPreparer:
    """Prepares batches on the host, in a thread ahead of the training step if the loader is built in, and moves them to the
    device."""

    def __init__(self, config: Config, state: ParallelState) -> None:
        self._state, self._data = state, config.data
        self._seq_len, self._vocab_size = config.train.seq_len, config.model.vocab_size
        self._row_length = config.train.row_length
        self._routes = config.model.use_moe
        self._drawn = config.seed.seed, state.group_rank("dp")  # determine how a user's own loader is shuffled
        self._pin = config.data.pin_memory and state.device.type == "cuda"

    def steps(
        self, data: LoadedData, count_of: Callable[[int], int], first: int, before: int = 0
    ) -> Iterator[list[Batch]]:
        """The micro-batches of one optimizer step at a time, from step ``first`` until the loader ends; ``count_of`` is the
        number of those of a step. A user's own loader is read again when it ends, and its first ``before`` micro-batches
        are skipped. Raises: DataError for invalid batches."""
        batches = iter(data.loader if data.ours else endless(data.loader, *self._drawn, before))
        numbers = count(first)

        def next_step() -> list[Batch]:
            step = next(numbers)
            taken = islice(batches, count_of(step))
            return [self.prepare(loaded, data.trusted, self._row_length(step)) for loaded in taken]

        steps = iter(next_step, [])
        with contextlib.closing(prefetched(steps, self._depth(data))) as ready:
            for microbatches in ready:
                yield [batch.to(self._state.device) for batch in microbatches]

    def once(self, data: LoadedData) -> Iterator[Batch]:
        """Every batch of a loader once. Raises: DataError for invalid batches."""
        loaded = data.loader if data.ours else one_pass(data.loader, *self._drawn)
        batches = (self.prepare(batch, data.trusted) for batch in loaded)
        with contextlib.closing(prefetched(batches, self._depth(data))) as ready:
            for batch in ready:
                yield batch.to(self._state.device)

    def _depth(self, data: LoadedData) -> int:
        """Number of steps that a thread prepares ahead. Worker processes read ahead themselves, and should not be forked
        from a thread; a user's own loader may not be thread-safe."""
        return self._data.prefetch if data.ours and not data.has_workers else 0

    def prepare(self, loaded: Any, trusted: bool = False, row_length: int | None = None) -> Batch:
        """This rank's part of a loaded micro-batch's sequences, on the host, cut into rows of ``row_length`` tokens if that
        is given; ``trusted``: the dataset has already checked lengths and token ids. Raises: DataError for invalid
        samples."""
        batch = as_batch(loaded)
        if not trusted:
            check_batch(batch, self._seq_len, self._vocab_size)
        if row_length is not None and row_length != batch.input_ids.shape[1]:
            batch = split_rows(batch, row_length)
        documents = None if batch.positions is None else documents_of(batch.positions)
        padding = batch.padding if self._routes else None
        if self._routes and padding is None and documents is not None and not trusted:
            padding = documents_without_target(documents, batch.labels, batch.weights)
        batch = batch._replace(padding=padding)
        rank, size = self._state.group_rank("sep"), self._state.layout.sep
        whole = {name: t for name in FIELDS if (t := getattr(batch, name)) is not None} | dict(batch.extras)
        of_tokens = batch.input_ids.shape  # [B, S]; only extras may have another shape
        parts = {name: cut_sequence(t, rank, size) if t.shape[:2] == of_tokens else t for name, t in whole.items()}
        if self._pin:
            parts = {name: part if part.is_pinned() else part.pin_memory() for name, part in parts.items()}
        known: dict[str, Any] = {name: parts.pop(name) for name in FIELDS if name in parts}
        return batch._replace(**known, extras=parts, documents=documents)


class BatchCount(NamedTuple):
    """Sums over the global batch of a step, on the device. ``divisor`` (int64, at least 1) is what the loss is divided by.
    ``weight_scale`` scales the weights of the valid targets so that they add up to their number. ``routing_scale`` turns
    sums over tokens (without padding) into means under that same division. ``empty`` (bool) says that no target counts, so
    that the loss has no mean."""

    divisor: torch.Tensor
    weight_scale: torch.Tensor
    routing_scale: torch.Tensor
    empty: torch.Tensor


def count_targets(
    microbatches: list[Batch],
    group: dist.ProcessGroup,
    normalizer: Callable[[Batch], torch.Tensor] = Batch.targets,
) -> BatchCount:
    """The count of a global batch, from this rank's micro-batches. ``normalizer`` returns what one micro-batch adds to the
    divisor, a whole number on the device (default: its valid targets). Collective over ``group``."""
    counts = [(normalizer(b), b.targets(), b.target_weight(), b.tokens()) for b in microbatches]
    rows = [torch.stack([count.double() for count in of_one]) for of_one in counts]
    divisor, targets, weight, tokens = sum_over(torch.stack(rows).sum(0), group)
    scale = torch.where(weight > 0, targets / weight, 0.0).float()
    empty = (divisor == 0) | ((targets > 0) & (weight == 0))
    divisor = divisor.clamp(min=1)
    return BatchCount(divisor.long(), scale, divisor / tokens.clamp(min=1), empty)


def scale_weights(microbatches: list[Batch], scale: torch.Tensor) -> list[Batch]:
    """The micro-batches with their targets' weights, if they have any, multiplied by ``scale``. With the one in
    ``BatchCount``, the single division gives the weighted mean."""
    return [b if b.weights is None else b._replace(weights=b.weights * scale) for b in microbatches]


def check_batch(batch: Batch, seq_len: int, vocab_size: int) -> None:
    """Raises: DataError for samples of another length than ``seq_len`` (the global batch would differ from the requested
    one), for token ids without an embedding (on a GPU they would end in a device assertion), and for invalid weights,
    padding and positions.

    Reads host memory, before the batch is moved to the device.
    """
    if batch.input_ids.shape[1] != seq_len:
        raise DataError(
            f"the dataset gave samples of {batch.input_ids.shape[1]} tokens, but --seq_len is {seq_len}; set --seq_len to "
            f"{batch.input_ids.shape[1]}, or cut the samples"
        )
    ids = torch.cat([batch.input_ids.flatten(), batch.labels[batch.labels != IGNORE_INDEX]])
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        advice = f"mark labels to ignore with {IGNORE_INDEX}" if low < 0 else "set --vocab_size to the tokenizer's"
        raise DataError(f"the dataset gave token id {low if low < 0 else high}, outside 0..{vocab_size - 1}; {advice}")
    if batch.weights is not None and not bool((batch.weights >= 0).all() and batch.weights.isfinite().all()):
        raise DataError(
            f"the dataset gave a weight of {float(batch.weights.min())}; weights must be finite and at least 0"
        )
    if batch.padding is not None and (wrong := int((batch.padding & (batch.labels != IGNORE_INDEX)).sum())):
        raise DataError(
            f"the dataset marks {wrong} tokens with a label as padding; padding has no targets: set their labels to "
            f"{IGNORE_INDEX}, or padding to 0"
        )
    if (positions := batch.positions) is not None:
        steps = positions.diff(dim=1)
        if bool(positions[:, 0].any()) or not bool(((steps == 1) | (positions[:, 1:] == 0)).all()):
            raise DataError(
                "the dataset gave positions that do not count from 0 in every row and document; give 0, 1, 2, ... and "
                "start again at 0 for each document"
            )
