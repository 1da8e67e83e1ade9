"""Tracking of the bytes that are alive on a device while a piece of torch code runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial, reduce
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinytron.kernels.attention_tiled import PARTS


class AllocationTracker(TorchDispatchMode):
    """Counts the storages that operators allocate inside ``with ledger:``: ``live`` is the current number of bytes,
    ``peak`` the maximum, and ``peak_phase`` the ``phase`` (a name that the caller sets) of the peak. Storages of
    ``known`` tensors already exist and do not count.

    Views share a storage. It counts once and in full as long as anything holds a part of it. The tracker looks inside our
    own operations (``PARTS``). It does not see memory that a torch kernel allocates and frees before it returns, with one
    exception: element-wise kernels on a CPU (``on_cpu``) copy operands whose precision differs from the result's.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), *, on_cpu: bool = False) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.live = self.peak = 0
        self.phase = self.peak_phase = ""
        self._known = {t.untyped_storage()._cdata: t for t in known}  # kept alive, so that no address is reused
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (parts := PARTS.get(func)) is not None:
            with self:
                return parts(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        if self.on_cpu and torch.Tag.pointwise in func.tags:
            self._see(self.live + _converted(args))
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, partial(self._remove, key, size))
        self.live += size
        self._see(self.live)

    def _see(self, live: int) -> None:
        if live > self.peak:
            self.peak = live
            self.peak_phase = self.phase

    def _remove(self, key: int, size: int, _: object) -> None:
        del self._alive[key]
        self.live -= size


def _converted(operands: Any) -> int:
    """Bytes of the copies of those ``operands`` that do not have the common precision."""
    tensors = [leaf for leaf in tree_leaves(operands) if isinstance(leaf, torch.Tensor) and leaf.ndim > 0]
    if len({t.dtype for t in tensors}) < 2:
        return 0
    common = reduce(torch.promote_types, (t.dtype for t in tensors))
    return sum(t.numel() * common.itemsize for t in tensors if t.dtype != common)
