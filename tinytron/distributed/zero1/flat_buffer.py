"""Flat buffers, which execute a ``BufferLayout``: parameters and gradients as views of flat memory, and collectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.distributed.collectives import (
    SummedExchange,
    Work,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from tinytron.distributed.sharding import Box, Run
from tinytron.distributed.zero1.buckets import BufferLayout, plan_buffer


@dataclass(frozen=True)
class BufferParam:
    """A parameter in a buffer, and the ``box`` of the global tensor ``name`` that it holds."""

    param: nn.Parameter
    name: str
    box: Box


@dataclass(frozen=True)
class Ownership:
    """The ranks that sum and own parameters which are cut over the mesh ``axes``.

    Their gradients are summed over ``group``. With ``shard``, each rank of the group owns a part of every bucket, by
    elements or (``whole_tensors``) by whole tensors. The squares of owned gradients are summed over ``norm_group``.
    ``reduce_dtype`` is the precision of gradients on the wire (default: the buffer's).
    """

    axes: tuple[str, ...]
    group: dist.ProcessGroup
    shard: bool
    whole_tensors: bool = False
    norm_group: dist.ProcessGroup | None = None
    reduce_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class OwnedSlice:
    """The part of tensor ``name`` that this rank owns: the elements of its flattened ``box`` that start at ``first``, as
    many as there are in ``main``.

    ``main`` is the fp32 (fp64 for fp64 models) master copy. It is the part of the inner optimizer's parameter ``holder``
    that starts at element ``start``.
    """

    name: str
    box: Box
    first: int
    main: torch.Tensor
    holder: nn.Parameter
    start: int

    @property
    def numel(self) -> int:
        """Number of elements of the global tensor."""
        return self.box.numel

    @property
    def runs(self) -> tuple[Run, ...]:
        """The positions of the elements of ``main``, in order, in the flattened global tensor."""
        return self.box.runs(self.first, self.first + len(self.main))


class FlatBuffer:
    """Flat memory for all parameters of one kind, with the same optimizer group, dtype and sharding axes.

    The members become views of one buffer and their ``.grad`` views of another, in fp32 (fp64 for fp64 parameters), so
    accumulation over micro-batches and the reduction over ranks lose no precision to bf16. The inner optimizer updates
    ``shards``: this rank's range of each bucket, or with ``whole_tensors`` each tensor in that range. Collective.
    """

    def __init__(
        self, members: Sequence[BufferParam], own: Ownership, *, bucket_numel: int, grad_as_view: bool = True
    ) -> None:
        self.members, self.own, self.grad_as_view = list(members), own, grad_as_view
        self.params = [m.param for m in members]
        self.num_shards = dist.get_world_size(own.group) if own.shard else 1
        self.shard_index = dist.get_rank(own.group) if own.shard else 0
        numels = [p.numel() for p in self.params]
        self.layout: BufferLayout = plan_buffer(numels, self.num_shards, bucket_numel, whole_tensors=own.whole_tensors)

        dtype, device = self.params[0].dtype, self.params[0].device
        self.main_dtype = torch.promote_types(dtype, torch.float32)
        self.param_data = torch.zeros(self.layout.numel, dtype=dtype, device=device)
        self.grad_data = torch.zeros(self.layout.numel, dtype=self.main_dtype, device=device)
        self._grad_views: list[torch.Tensor] = [self.grad_data] * len(self.params)  # placeholders, replaced below
        for slot in self.layout.slots:
            param = self.params[slot.index]
            view = self.param_data[slot.start : slot.end].view_as(param)
            view.copy_(param.data)
            param.data = view
            self._grad_views[slot.index] = self.grad_data[slot.start : slot.end].view_as(param)
        # A custom model may have been initialized differently on each rank; the first rank's weights are used.
        dist.broadcast(self.param_data, group=own.group, group_src=0)
        for member, param in enumerate(self.params):
            if param.grad is not None:
                self.take_grad(member)  # keep gradients accumulated before the buffer existed
            else:
                self._release_grad(param)
        wire_dtype = own.reduce_dtype or self.main_dtype
        self._exchanges: list[SummedExchange] = []
        if own.shard and (own.reduce_dtype is not None or dist.get_backend(own.group) != "nccl"):
            self._exchanges = [
                SummedExchange(self._owned(self.grad_data, b), self._whole(self.grad_data, b), own.group, wire_dtype)
                for b in self.bucket_ids
            ]
        # Main copies of the owned range of each bucket; they are views if the parameters already have that precision.
        self._mains = [self._owned(self.param_data, b).to(self.main_dtype) for b in self.bucket_ids]
        self.shards: list[nn.Parameter] = []
        self._ranges: list[tuple[int, int, int]] = []  # for each shard: bucket, start and end in the buffer
        for b in self.bucket_ids:
            start, end = self.layout.owned(b, self.shard_index)
            if not own.whole_tensors:
                self._add_shard(b, start, end, (end - start,))
                continue
            for slot in self.layout.slots:
                if slot.bucket == b and start <= slot.start < end:
                    self._add_shard(b, slot.start, slot.end, tuple(self.params[slot.index].shape))

    def _add_shard(self, bucket: int, start: int, end: int, shape: tuple[int, ...]) -> None:
        first = self.layout.owned(bucket, self.shard_index)[0]
        shard = nn.Parameter(self._mains[bucket][start - first : end - first].view(shape))
        shard.grad = self.grad_data[start:end].view(shape)
        self.shards.append(shard)
        self._ranges.append((bucket, start, end))

    @property
    def bucket_ids(self) -> range:
        """The numbers of the buckets."""
        return range(len(self.layout.buckets))

    def _owned(self, flat: torch.Tensor, bucket: int) -> torch.Tensor:
        start, end = self.layout.owned(bucket, self.shard_index)
        return flat[start:end]

    def _whole(self, flat: torch.Tensor, bucket: int) -> torch.Tensor:
        return flat[self.layout.buckets[bucket].start : self.layout.buckets[bucket].end]

    @torch.no_grad()
    def take_grad(self, member: int) -> None:
        """Move the gradient that autograd made for a member into the buffer, where later gradients are added to it.

        Moving the first gradient takes a third of the memory traffic of zeroing the buffer, casting and adding.
        """
        param, view = self.params[member], self._grad_views[member]
        if param.grad is not None and param.grad is not view:
            view.copy_(param.grad)
            if self.grad_as_view:
                param.grad = None
                param.grad_dtype = self.main_dtype  # autograd casts, then adds: measured 1.6x faster than a mixed add
                param.grad = view

    def _release_grad(self, param: torch.Tensor) -> None:
        param.grad = None
        param.grad_dtype = None if self.grad_as_view else self.main_dtype  # None: keep the precision it arrives in

    def release_grads(self) -> None:
        """Drop all gradients; the next ones overwrite them."""
        for param in self.params:
            self._release_grad(param)

    def reduce_bucket(self, bucket: int) -> Work:
        """Start summing a bucket's gradients over the group; the owned range holds the sum after the wait."""
        for slot in self.layout.slots:
            if slot.bucket == bucket:
                param = self.params[slot.index]
                if param.grad is None:  # the parameter is unused, or user code set its gradient to None
                    self._grad_views[slot.index].zero_()
                self.take_grad(slot.index)
        whole, own = self._whole(self.grad_data, bucket), self._owned(self.grad_data, bucket)
        if not self.own.shard:
            return start_all_reduce(whole, self.own.group)
        if self._exchanges:
            return self._exchanges[bucket].start()
        return start_reduce_scatter(own, whole, self.own.group)

    def squared_norm(self) -> torch.Tensor:
        """Sum of squares of this buffer's gradients over all ranks' parts, counting each element once, in fp64.
        Collective."""
        # Padding is zero.
        square = torch.stack([torch.linalg.vector_norm(g) for g in self.owned_grads]).double().square().sum()
        if self.own.norm_group is not None:
            dist.all_reduce(square, op=dist.ReduceOp.SUM, group=self.own.norm_group)
        return square

    def owned_parts(self) -> Iterator[tuple[int, int, slice]]:
        """For each part of a member that this rank owns: the member's number, the bucket, and the part's place in what
        ``owned_grads``, ``main_weights`` and ``keep_weights`` give for that bucket."""
        for slot in self.layout.slots:
            first, last = self.layout.owned(slot.bucket, self.shard_index)
            low, high = max(first, slot.start), min(last, slot.end)
            if low < high:
                yield slot.index, slot.bucket, slice(low - first, high - first)

    @property
    def owned_grads(self) -> list[torch.Tensor]:
        """This rank's part of each bucket of gradients, which holds the sums over the group once they are reduced."""
        return [self._owned(self.grad_data, b) for b in self.bucket_ids]

    @property
    def main_weights(self) -> list[torch.Tensor]:
        """The main copy of this rank's part of each bucket."""
        return self._mains

    def keep_weights(self) -> list[torch.Tensor]:
        """Copies of ``main_weights``, of which ``drop_weights`` disposes. They take no memory if several ranks share the
        states: once gradients are reduced, the other ranks' parts of the gradient buffer are free until the next backward
        pass."""
        if self.num_shards == 1:
            return [main.clone() for main in self._mains]
        return [self._free(b).copy_(main) for b, main in enumerate(self._mains)]

    def drop_weights(self) -> None:
        """Clear what ``keep_weights`` wrote, because the gradients of padding must be zero."""
        if self.num_shards > 1:
            for b in self.bucket_ids:
                self._free(b).zero_()

    def _free(self, bucket: int) -> torch.Tensor:
        """The next rank's part of a bucket of gradients."""
        start, end = self.layout.owned(bucket, (self.shard_index + 1) % self.num_shards)
        return self.grad_data[start:end]

    def scale_grads(self, factor: torch.Tensor) -> None:
        """Multiply the owned gradients by ``factor``."""
        for grads in self.owned_grads:
            grads.mul_(factor)

    def start_param_gather(self, bucket: int) -> Work | None:
        """Start the all-gather that copies a bucket's updated shards to the model's parameters on every rank of the
        group."""
        own = self._owned(self.param_data, bucket)
        if own.dtype != self.main_dtype:
            own.copy_(self._mains[bucket])
        if not self.own.shard:
            return None
        return start_all_gather(self._whole(self.param_data, bucket), own, self.own.group)

    def refresh_shards(self) -> None:
        """Set the main copies from the model's parameters; needed after other code (loading a checkpoint) changed them."""
        for b in self.bucket_ids:
            self._mains[b].copy_(self._owned(self.param_data, b))

    def pieces(self) -> Iterator[OwnedSlice]:
        """The slices that this rank owns, parameter by parameter; the union over all ranks covers each element once."""
        for slot in self.layout.slots:
            member = self.members[slot.index]
            for shard, (bucket, start, end) in zip(self.shards, self._ranges, strict=True):
                low, high = max(start, slot.start), min(end, slot.end)
                if bucket == slot.bucket and low < high:
                    main = shard.data.view(-1)[low - start : high - start]
                    yield OwnedSlice(member.name, member.box, low - slot.start, main, shard, low - start)
