"""Passes over a custom loader. The loader may shuffle with torch's global generator, as ``DataLoader(shuffle=True)`` does,
or by epoch number, as ``DistributedSampler`` does. This module derives both from (seed, rank, pass), so that a resumed run
skips what it has already read and reads the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from typing import Any

import torch

from tinytron.errors import DataError


def one_pass(loader: Iterable[Any], seed: int, rank: int = 0, number: int = 0) -> Iterator[Any]:
    """The items of ``loader``. Torch's samplers shuffle, and workers get their seeds, before the first item; until then
    (seed, rank, number) seed the global CPU generator. Afterwards its old state is restored."""
    digest = hashlib.sha256(f"{seed}:{rank}:{number}".encode()).digest()
    generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        items = iter(loader)
        first = list(islice(items, 1))
    finally:
        generator.set_state(state)
    return chain(first, items)


def endless(loader: Iterable[Any], seed: int, rank: int, skip: int = 0) -> Iterator[Any]:
    """The items of pass after pass over ``loader``, without the first ``skip``. ``rank`` numbers the ranks that read
    different data. Before each pass, its number goes to every ``set_epoch`` of the loader, its samplers and its dataset.
    Raises: DataError for a pass without items."""
    for number in count():
        for set_epoch in _epoch_setters(loader):
            set_epoch(number)
        some = False
        for item in one_pass(loader, seed, rank, number):
            some = True
            if skip > 0:
                skip -= 1
            else:
                yield item
        if not some:
            raise DataError("train_loader gave no batch; it must give this rank's micro-batches on every pass")


def _epoch_setters(loader: Any) -> list[Any]:
    dataset, sampler, batch_sampler = (getattr(loader, name, None) for name in ("dataset", "sampler", "batch_sampler"))
    parts = [dataset, sampler, getattr(batch_sampler, "sampler", None), batch_sampler, loader]
    distinct = {id(part): part for part in parts}.values()
    return [part.set_epoch for part in distinct if callable(getattr(part, "set_epoch", None))]
