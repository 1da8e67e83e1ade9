"""Host waits, seen on a CPU: operations that would make the host wait for a GPU, by name."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
# Values, or sizes that depend on values, that the host needs; and host values that are copied to the device.
_OPERATORS = {
    _ATEN._local_scalar_dense,  # item(), float(), int(), bool()
    _ATEN.is_nonzero,
    _ATEN.equal,
    _ATEN.nonzero,
    _ATEN.masked_select,
    _ATEN.bincount,
    _ATEN.unique_dim,
    _ATEN.unique_consecutive,
    _ATEN._unique2,
    _ATEN.lift_fresh,  # torch.tensor(...)
}
_METHODS = ("tolist", "numpy", "cpu")  # on a CPU these read memory without any operator


class HostWaits(TorchDispatchMode):
    """Inside, counts by name what would make the host wait for a GPU; ``count`` is empty if nothing would. It sees this
    thread, the backward pass included. Override ``found`` to do something else than count."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self._thread = threading.get_ident()
        self._hidden: dict[str, Any] = {}  # replacements that an outer instance made

    def found(self, name: str) -> None:
        """The operation ``name``, which is about to run, would wait."""
        self.count[name] += 1

    def __enter__(self) -> HostWaits:
        """Count from now on."""
        self._hidden = {name: vars(torch.Tensor)[name] for name in _METHODS if name in vars(torch.Tensor)}
        for name in _METHODS:  # inherited: what is set here hides them
            setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Count no more."""
        super().__exit__(*error)
        for name in _METHODS:
            if name in self._hidden:
                setattr(torch.Tensor, name, self._hidden[name])
            else:
                delattr(torch.Tensor, name)

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread:
                self.found(name)
            return method(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; first tell ``found`` if it would wait."""
        kwargs, packet = kwargs or {}, func.overloadpacket
        waits = packet in _OPERATORS
        if packet in (_ATEN.index, _ATEN.index_put, _ATEN.index_put_):
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if packet is _ATEN.repeat_interleave:
            waits = kwargs.get("output_size") is None
        if waits:
            self.found(packet.__name__)
        return func(*args, **kwargs)
