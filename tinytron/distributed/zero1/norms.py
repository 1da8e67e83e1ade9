"""Norms of every parameter's gradient, weights and update, measured on the sharded states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.zero1.flat_buffer import FlatBuffer

KINDS = ("grad", "param", "update")


class TensorNorms:
    """Measures the steps of a ``DistributedOptimizer``. For each parameter it has the norm of the gradient before clipping,
    of the weights after the step, and of the difference that the step made to them (0 for a skipped step).

    Each rank measures the parts that it owns, in the main precision (fp32, or fp64 for fp64 models). To know the update it
    keeps a copy of its weights during the step (``FlatBuffer.keep_weights``). The host does not wait.
    """

    def __init__(self, buffers: Sequence[FlatBuffer], state: ParallelState, loss_scale: torch.Tensor) -> None:
        self.buffers, self._state, self._loss_scale = buffers, state, loss_scale
        self._names = [member.name for buffer in buffers for member in buffer.members]
        # Without sharding all ranks of a group own the same elements; the first one's count.
        counted = [buffer.own.shard or dist.get_rank(buffer.own.group) == 0 for buffer in buffers]
        firsts = [sum(len(buffer.members) for buffer in buffers[:i]) for i in range(len(buffers))]
        places = [
            (first + member, i, bucket, part)
            for i, (buffer, first, counts) in enumerate(zip(buffers, firsts, counted, strict=True))
            for member, bucket, part in (buffer.owned_parts() if counts else ())
        ]
        device = state.device
        self._parts = [place[1:] for place in places]
        self._index = torch.tensor([place[0] for place in places], dtype=torch.int64, device=device)
        self._squares = torch.zeros(len(KINDS), len(self._names), dtype=torch.float64, device=device)

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """Context of an update: the gradients are reduced before it and clipped in it. The last step measured counts."""
        self._squares.zero_()
        self._add("grad", [buffer.owned_grads for buffer in self.buffers])
        self._squares /= self._loss_scale.double().square()
        kept = [buffer.keep_weights() for buffer in self.buffers]
        yield
        self._add("param", [buffer.main_weights for buffer in self.buffers])
        for buffer, before in zip(self.buffers, kept, strict=True):
            for old, new in zip(before, buffer.main_weights, strict=True):
                old -= new
        self._add("update", kept)
        for buffer in self.buffers:
            buffer.drop_weights()

    def _add(self, kind: str, tensors: Sequence[Sequence[torch.Tensor]]) -> None:
        """Add the squares of ``tensors``, by buffer and bucket."""
        parts = [tensors[i][bucket][part] for i, bucket, part in self._parts]
        if parts:
            squares = torch.stack(torch._foreach_norm(parts)).double().square()
            self._squares[KINDS.index(kind)].index_add_(0, self._index, squares)

    def totals(self) -> dict[str, dict[str, float]]:
        """The norms of the last step by kind and parameter, over all ranks. Collective; the host waits."""
        rows = sum_over(self._squares.clone(), self._state.groups["world"]).sqrt().tolist()
        return {kind: dict(zip(self._names, row, strict=True)) for kind, row in zip(KINDS, rows, strict=True)}
