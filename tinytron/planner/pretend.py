"""Stand-ins that let a training step run without memory, other ranks or a GPU: fake tensors have shapes but no values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState

DeviceKind = Literal["cpu", "cuda"]
_aten = torch.ops.aten


class PretendGroup:
    """A process group of ``size`` ranks that sends nothing: only the shapes of results are right."""

    group_name = ""  # operators look it up only for real tensors

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        """Number of ranks in the group."""
        return self._size

    def all_to_all_single(self, *_: Any) -> None:
        """Called by ``dist.all_to_all_single``."""

    alltoall_base = all_to_all_single  # the name before torch 2.13

    def allreduce(self, *_: Any) -> None:
        """Called by ``dist.all_reduce``."""


@dataclass(frozen=True)
class PretendState(ParallelState):
    """The first rank of a layout, without processes."""

    @classmethod
    def of(cls, layout: ParallelLayout) -> PretendState:
        """The state of rank 0 of ``layout``."""
        groups: dict[str, Any] = {axis: PretendGroup(layout.size(axis)) for axis in layout.axes}
        return cls(layout, 0, torch.device("cpu"), groups)


class FakeDeviceMode(TorchFunctionMode):
    """Inside this mode, fake CPU tensors are treated as if they were on a ``kind`` device.

    For a CPU nothing changes. For a GPU the mode replaces the three operators that keep different tensors there: attention
    (flash kernels in 16 bit, memory-efficient kernels in fp32 and with masks, otherwise all scores), RMSNorm and dropout.
    It also sets ``is_cuda`` to true, which determines the chunk size of the loss.
    """

    def __init__(self, kind: DeviceKind) -> None:
        super().__init__()
        self._answers: dict[Any, Callable[..., Any]] = {}
        if kind == "cuda":
            self._answers = {
                torch.Tensor.is_cuda.__get__: lambda _: True,  # type: ignore[attr-defined]
                F.scaled_dot_product_attention: _attention_of_cuda,
                F.rms_norm: lambda x, shape, weight, eps: _aten._fused_rms_norm(x, shape, weight, eps)[0],
                F.dropout: _dropout_of_cuda,
            }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._answers.get(func, func)(*args, **(kwargs or {}))


def _attention_of_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The attention kernel that torch uses on Ampere and newer GPUs."""
    if q.dtype in (torch.bfloat16, torch.float16) and attn_mask is None and q.shape[-1] <= 256:
        return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    if q.dtype != torch.float64 and not enable_gqa:  # the memory-efficient kernel needs a key head per query head
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
        return _aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal)[0]
    return _aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa)[0]


def _dropout_of_cuda(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(x, p, True)[0] if training else x


class UniformRoutingMode(TorchDispatchMode):
    """Inside this mode, routers send every expert the same number of rows: ``plan_dispatch`` reads ``expert_rows`` on the
    host. ``grouped_mm`` also works on fake tensors of any precision; torch supports only bf16 there, although it has
    kernels for fp32 as well."""

    def __init__(self, expert_rows: list[int]) -> None:
        super().__init__()
        self._rows = itertools.cycle(expert_rows)  # tolist of a fake tensor asks for the numbers one by one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:
            return next(self._rows)
        if func is not _aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        a, b, offs = (*args, *(kwargs or {}).values())[:3]
        # [Q, D] x [e, D, F] -> [Q, F]; the backward pass also needs [D, Q] x [Q, F] -> [e, D, F]
        groups = () if b.ndim == 3 else (len(offs),)
        return a.new_empty(*groups, a.shape[0], b.shape[-1])


def with_fake_memory(model: nn.Module, fake: Any) -> list[torch.Tensor]:
    """Give a model that was built on the meta device parameters and buffers in the fake memory of ``fake`` (a
    ``FakeTensorMode``), and return them, each once. Tied parameters stay tied."""
    made: dict[int, Any] = {}
    with fake:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in made:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                        made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in made:
                        made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
                    module._buffers[name] = made[id(buffer)]
    return list(made.values())
