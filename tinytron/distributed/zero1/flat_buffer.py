"""The executor of one ``BufferLayout``: parameters and gradients as views of flat memory, and their collectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.distributed.collectives import all_gather, reduce_scatter
from tinytron.distributed.zero1.buckets import BufferLayout, plan_by_elements


@dataclass(frozen=True)
class Piece:
    """The part of parameter ``name`` that this rank owns: its flattened elements ``[offset, offset + len(main))``.

    ``main`` is the fp32 (fp64 for fp64 models) master copy; ``holder`` and ``start`` say which shard parameter of the
    inner optimizer it is a part of, and from which element.
    """

    name: str
    numel: int
    offset: int
    main: torch.Tensor
    holder: nn.Parameter
    start: int


class FlatBuffer:
    """All parameters of one kind (same optimizer group, dtype and gradient group) in flat memory.

    ``params`` become views of one buffer and their ``.grad`` views of another, in fp32 (fp64 for fp64 parameters), so
    accumulation over micro-batches and the reduction over ranks lose nothing to bf16. ``group`` are the ranks that the
    gradients are summed over; with ``shard`` each of them owns one part of every bucket, without it all own all.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        group: dist.ProcessGroup,
        *,
        shard: bool,
        bucket_numel: int,
        grad_as_view: bool = True,
    ) -> None:
        self.params, self.names, self.group, self.shard = list(params), list(names), group, shard
        self.grad_as_view = grad_as_view
        self.num_shards = dist.get_world_size(group) if shard else 1
        self.shard_index = dist.get_rank(group) if shard else 0
        self.layout: BufferLayout = plan_by_elements([p.numel() for p in params], self.num_shards, bucket_numel)

        dtype, device = params[0].dtype, params[0].device
        self.main_dtype = torch.promote_types(dtype, torch.float32)
        self.param_data = torch.zeros(self.layout.numel, dtype=dtype, device=device)
        self.grad_data = torch.zeros(self.layout.numel, dtype=self.main_dtype, device=device)
        for slot in self.layout.slots:
            param = self.params[slot.index]
            view = self.param_data[slot.start : slot.end].view_as(param)
            view.copy_(param.data)
            param.data = view
            param.grad = None
            param.grad_dtype = self.main_dtype  # autograd casts, then adds: measured 1.6x faster than a mixed add
        self.attach_grads()
        # One inner-optimizer parameter per bucket: the owned range, as a view where no second copy is needed.
        self.shards = [nn.Parameter(self._owned(self.param_data, b).to(self.main_dtype)) for b in self._bucket_ids()]
        for b in self._bucket_ids():
            self.shards[b].grad = self._owned(self.grad_data, b)

    def _bucket_ids(self) -> range:
        return range(len(self.layout.buckets))

    def _owned(self, flat: torch.Tensor, bucket: int) -> torch.Tensor:
        start, end = self.layout.owned(bucket, self.shard_index)
        return flat[start:end]

    def _whole(self, flat: torch.Tensor, bucket: int) -> torch.Tensor:
        return flat[self.layout.buckets[bucket].start : self.layout.buckets[bucket].end]

    def attach_grads(self) -> None:
        """Zero the gradient buffer and (re)connect every ``.grad`` to it; user code may have set them to ``None``."""
        self.grad_data.zero_()
        for slot in self.layout.slots:
            param = self.params[slot.index]
            param.grad = self.grad_data[slot.start : slot.end].view_as(param) if self.grad_as_view else None

    def reduce_bucket(self, bucket: int) -> dist.Work | None:
        """Start summing a bucket's gradients over the group; owned ranges hold the sum once the work is waited for."""
        if not self.grad_as_view:
            self._copy_grads_in(bucket)
        whole = self._whole(self.grad_data, bucket)
        if self.shard:
            own = self._owned(self.grad_data, bucket)
            work: dist.Work | None = reduce_scatter(own, whole, op=dist.ReduceOp.SUM, group=self.group, async_op=True)
            return work
        reduced: dist.Work | None = dist.all_reduce(whole, op=dist.ReduceOp.SUM, group=self.group, async_op=True)
        return reduced

    def _copy_grads_in(self, bucket: int) -> None:
        for slot in self.layout.slots:
            param = self.params[slot.index]
            if slot.bucket == bucket and param.grad is not None:
                self.grad_data[slot.start : slot.end].copy_(param.grad.flatten())

    def publish(self) -> None:
        """Make the updated shards the model's parameters on every rank of the group. Collective when sharded."""
        works = []
        for b in self._bucket_ids():
            own = self._owned(self.param_data, b)
            if own.dtype != self.main_dtype:
                own.copy_(self.shards[b].data)
            if self.shard:
                whole = self._whole(self.param_data, b)
                works.append(all_gather(whole, own, group=self.group, async_op=True))
        for work in works:
            work.wait()

    def refresh_shards(self) -> None:
        """Set the main copies from the model's parameters, after somebody (a checkpoint) wrote those."""
        for b in self._bucket_ids():
            self.shards[b].data.copy_(self._owned(self.param_data, b))

    def pieces(self) -> Iterator[Piece]:
        """What this rank owns, parameter by parameter; the union over a sharding group covers each element once."""
        for slot in self.layout.slots:
            start, end = self.layout.owned(slot.bucket, self.shard_index)
            low, high = max(start, slot.start), min(end, slot.end)
            if low < high:
                shard = self.shards[slot.bucket]
                yield Piece(
                    name=self.names[slot.index],
                    numel=slot.numel,
                    offset=low - slot.start,
                    main=shard.data[low - start : high - start],
                    holder=shard,
                    start=low - start,
                )
