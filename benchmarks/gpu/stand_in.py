"""CPU stand-ins for ``torch.cuda``, so that code written for a GPU can be rehearsed on a machine without one.

``install()`` replaces the functions below. ``torch.cuda.is_available()`` stays False: the library decides by it and then
runs on the CPU with gloo, while a rehearsed script goes through its own lines on streams, events, graphs and memory.
Times are host times and memory is the resident set, so the figures of a rehearsal mean nothing.
"""

from __future__ import annotations

import importlib.metadata
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from host_waits import HostWaits
from resident import is_measurable, peak_resident, reset_peak, resident

CPU = torch.device("cpu")


class Event:
    """A CUDA event: remembers when the host reached it."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timing = enable_timing
        self._at: float | None = None

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``. Raises: RuntimeError, as on a GPU, for events without timing and for
        those that were never recorded."""
        if not (self._timing and end._timing):
            raise RuntimeError("both events need enable_timing=True")
        if self._at is None or end._at is None:
            raise RuntimeError("both events must be recorded before the time between them is asked for")
        return 1e3 * (end._at - self._at)


class Stream:
    """A CUDA stream: everything is in order already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        _refuse_while_capturing("Stream.synchronize")

    def query(self) -> bool:
        return True


class CUDAGraph:
    """A CUDA graph: the operations run while it was captured, with the tensors they read and wrote."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def replay(self) -> None:
        """Run the operations again, into the same memory. Raises: RuntimeError, as on a GPU, if nothing was captured."""
        if not self.calls:
            raise RuntimeError("replay of a graph that has captured nothing")
        with torch.no_grad():
            for function, args, kwargs, results in self.calls:
                tensors, works = _parts(function(*args, **kwargs))
                for work in works:  # collectives of gloo go on in a thread
                    work.wait()
                for old, new in zip(results, tensors, strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        self.calls.clear()


class _Capture(HostWaits):
    """Records operations. Host reads raise, as on a GPU; and as there nothing is computed: what the operations wrote to
    memory that existed before is restored."""

    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, content in self._before.values():
            storage.copy_(content)

    def found(self, name: str) -> None:
        raise RuntimeError(f"operation not permitted when stream is capturing: the host waits in {name}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _written(func, args, kwargs or {}):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = storage, storage.clone()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.graph.calls.append((func, args, kwargs or {}, _parts(result)[0]))
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that the operator writes to; of collectives, which do not say so, all."""
    if func.namespace == "c10d":
        return _parts(args)[0]
    names = {one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write}
    given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
    return _parts([value for name, value in given.items() if name in names])[0]


def _parts(result: Any) -> tuple[list[torch.Tensor], list[Any]]:
    """The tensors of an operator's result, however deep they are in lists, and the collectives to wait for."""
    if isinstance(result, torch.Tensor):
        return [result], []
    if isinstance(result, torch.ScriptObject):
        return [], [result] if hasattr(result, "wait") else []
    tensors, works = [], []
    for one in result if isinstance(result, list | tuple) else ():
        found = _parts(one)
        tensors += found[0]
        works += found[1]
    return tensors, works


_CAPTURES: list[_Capture] = []  # the one under way


def _refuse_while_capturing(name: str) -> None:
    if _CAPTURES:
        raise RuntimeError(f"operation not permitted when stream is capturing: {name}")


@contextmanager
def graph(cuda_graph: CUDAGraph, **_: Any) -> Iterator[None]:
    """Capture what runs inside. Raises: RuntimeError, as on a GPU, where the host would wait."""
    with _Capture(cuda_graph) as capture:
        _CAPTURES.append(capture)
        try:
            yield
        finally:
            _CAPTURES.pop()


class _SyncDebug(HostWaits):
    """Warns of host waits, or raises, in torch's words."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def found(self, name: str) -> None:
        if self.mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation ({name})")
        warnings.warn(f"called a synchronizing CUDA operation ({name})", UserWarning, stacklevel=3)


_SYNC_DEBUG: list[_SyncDebug] = []  # the one that is switched on


def set_sync_debug_mode(mode: int | str) -> None:
    """Warn (``"warn"``) or raise (``"error"``) where the host would wait for a GPU, until ``"default"``."""
    name = mode if isinstance(mode, str) else ("default", "warn", "error")[mode]
    if name not in ("default", "warn", "error"):
        raise RuntimeError(f"invalid value of sync_debug_mode: {mode}")
    while _SYNC_DEBUG:
        _SYNC_DEBUG.pop().__exit__(None, None, None)
    if name != "default":
        _SYNC_DEBUG.append(_SyncDebug(name))
        _SYNC_DEBUG[-1].__enter__()


@contextmanager
def stream(_: Any) -> Iterator[None]:
    """Run what is inside on a stream: here in order."""
    yield


def synchronize(*_: Any, **__: Any) -> None:
    """Wait for the device: nothing is under way. Raises: RuntimeError, as on a GPU, during a capture."""
    _refuse_while_capturing("synchronize")


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
    "is_current_stream_capturing": lambda: bool(_CAPTURES),
    "synchronize": synchronize,
    "empty_cache": _nothing,
    "set_sync_debug_mode": set_sync_debug_mode,
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


def interpreter_problem() -> str:
    """Why Triton's interpreter cannot run here, or an empty text. Before 3.7 it fails with numpy 2.4 and newer."""
    found = []
    for name in ("triton", "numpy"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is missing: pip install {name}"
        found.append(tuple(int(part) for part in version.split(".")[:2]))
    triton, numpy = found
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of triton before 3.7 fails with numpy 2.4 and newer: pip install 'numpy<2.4'"
    return ""


def install(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Put the stand-ins into ``torch.cuda``; ``set_attribute`` may be pytest's monkeypatch.setattr.

    Raises: RuntimeError on a machine with a GPU, where there is nothing to rehearse.
    """
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: run for real, without --rehearse")
    for name, value in STAND_INS.items():
        set_attribute(torch.cuda, name, value)
