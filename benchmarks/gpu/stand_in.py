"""CPU stand-ins for ``torch.cuda``, so that code written for a GPU can be rehearsed on a machine without one.

``install()`` replaces the functions below. ``torch.cuda.is_available()`` stays False: the library decides by it and then
runs on the CPU with gloo, while a rehearsed script goes through its own lines on streams, events, graphs and memory.
Times are host times and memory is the resident set, so the figures of a rehearsal mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from resident import is_measurable, peak_resident, reset_peak, resident
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


class Event:
    """A CUDA event: remembers when the host reached it."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timing, self._at = enable_timing, 0.0

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``. Raises: RuntimeError, as on a GPU, for events without timing."""
        if not (self._timing and end._timing):
            raise RuntimeError("both events need enable_timing=True")
        return 1e3 * (end._at - self._at)


class Stream:
    """A CUDA stream: everything is in order already."""

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass


class CUDAGraph:
    """A CUDA graph: the operations run while it was captured, with the tensors they read and wrote."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def replay(self) -> None:
        """Run the operations again, into the same memory."""
        with torch.no_grad():
            for function, args, kwargs, results in self.calls:
                again = _tensors(function(*args, **kwargs))
                for old, new in zip(results, again, strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: the host reads a value")
        result = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, _tensors(result)))
        return result


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for t in result if isinstance(t, torch.Tensor)] if isinstance(result, list | tuple) else []


@contextmanager
def graph(cuda_graph: CUDAGraph, **_: Any) -> Iterator[None]:
    """Capture what runs inside. Raises: RuntimeError, as on a GPU, where the host would wait for a value."""
    with _Capture(cuda_graph):
        yield


@contextmanager
def stream(_: Any) -> Iterator[None]:
    """Run what is inside on a stream: here in order."""
    yield


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _memory(*_: Any, **__: Any) -> int:
    return resident() if is_measurable() else 0


def _peak(*_: Any, **__: Any) -> int:
    return peak_resident() if is_measurable() else 0


def _reset(*_: Any, **__: Any) -> None:
    if is_measurable():
        reset_peak()


STAND_INS: dict[str, Any] = {
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    "stream": stream,
    "current_stream": lambda *_: Stream(),
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "set_sync_debug_mode": _nothing,
    "memory_allocated": _memory,
    "max_memory_allocated": _peak,
    "memory_reserved": _memory,
    "max_memory_reserved": _peak,
    "reset_peak_memory_stats": _reset,
    "mem_get_info": lambda *_: (4 * 2**30, 4 * 2**30),
    "get_device_name": lambda *_: "rehearsal on a CPU",
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: SimpleNamespace(
        name="rehearsal on a CPU",
        total_memory=4 * 2**30,
        multi_processor_count=1,
        major=9,
        minor=0,
        L2_cache_size=2**20,
    ),
}


def install(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Put the stand-ins into ``torch.cuda``; ``set_attribute`` may be pytest's monkeypatch.setattr.

    Raises: RuntimeError on a machine with a GPU, where there is nothing to rehearse.
    """
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: run for real, without --rehearse")
    for name, value in STAND_INS.items():
        set_attribute(torch.cuda, name, value)
