"""Any torch optimizer, with summed gradients and, by default, its states sharded over the ranks (ZeRO-1).

    backward -> .grad (view of the flat fp32 buffer) -> bucket full: reduce-scatter of the SUM, asynchronous
    step     -> norm of the owned ranges, summed over ranks -> clip -> inner step on fp32 shards -> all-gather

Sources: ZeRO (arXiv:1910.02054, section 5); bucketed overlap as in PyTorch DDP (arXiv:2006.15704, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.distributed.param_spec import ParamSpec
from tinytron.distributed.zero1.flat_buffer import FlatBuffer, Piece
from tinytron.errors import ConfigError


class DistributedOptimizer:
    """Wraps ``optimizer`` (any element-wise ``torch.optim.Optimizer``) for the ranks of ``process_group``.

    The optimizer's parameters move into flat buffers (they stay the same ``nn.Parameter`` objects), its parameter
    groups are pointed at this rank's fp32 shards, and its options (``lr``, ``weight_decay``, ...) stay per group. Scale
    each loss so that the *sum* over all ranks and micro-batches is the gradient you want: nothing is averaged.

        with optimizer.accumulate(last=True):
            loss.backward()
        grad_norm = optimizer.step(max_norm=1.0)
        optimizer.zero_grad()

    ``shard=False`` keeps whole states on every rank (all-reduce instead of reduce-scatter and all-gather).
    ``bucket_size_mb`` is the gradient volume exchanged at a time. ``allow_unused`` accepts parameters without a gradient
    (they count as zero). ``loss_scaling`` guards fp16 gradients against underflow. Collective on construction.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        process_group: dist.ProcessGroup | None = None,
        *,
        shard: bool = True,
        bucket_size_mb: float = 64.0,
        grad_as_view: bool = True,
        allow_unused: bool = False,
        loss_scaling: bool = False,
    ) -> None:
        self.inner, self.shard, self.allow_unused, self.grad_as_view = optimizer, shard, allow_unused, grad_as_view
        self.bucket_numel = int(bucket_size_mb * 2**20) // 4
        self._model_params: list[list[nn.Parameter]] = [list(g["params"]) for g in optimizer.param_groups]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        group = process_group if process_group is not None else dist.group.WORLD
        assert group is not None, "initialise the process group before DistributedOptimizer"
        flat = [p for params in self._model_params for p in params]
        self._build({id(p): f"param{i}" for i, p in enumerate(flat)}, {}, {"dense": group, "expert": group})
        device = flat[0].device
        self.loss_scale = torch.tensor(65536.0 if loss_scaling else 1.0, device=device)
        self._growth_tracker = torch.zeros((), dtype=torch.int32, device=device) if loss_scaling else None
        self.skipped_steps = torch.zeros((), device=device)

    def attach(self, model: nn.Module, specs: Sequence[ParamSpec], groups: Mapping[str, dist.ProcessGroup]) -> None:
        """Learn the parameters' names and gradient groups, and lay the buffers out anew. Collective.

        ``groups`` maps ``"dense"`` and ``"expert"`` to the ranks their gradients are summed over: it replaces
        ``process_group``, so that a wrapper made with the data-parallel group is right at any sequence-parallel size.
        Raises: ConfigError if the optimizer misses a trainable parameter of ``model``.
        """
        names = {id(p): name for name, p in model.named_parameters()}
        ours = {id(p) for params in self._model_params for p in params}
        missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
        if missing:
            raise ConfigError(
                f"the optimizer does not update {len(missing)} trainable parameters ({', '.join(missing[:3])}, ...); "
                "build it from self.raw_model.parameters(), or set requires_grad=False on those"
            )
        self._build(names, {spec.name: spec.gradient_group for spec in specs}, groups)

    def _build(
        self, names: Mapping[int, str], kinds: Mapping[str, str], groups: Mapping[str, dist.ProcessGroup]
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self.buffers: list[FlatBuffer] = []
        order: dict[int, int] = {key: i for i, key in enumerate(names)}
        for options, params in zip(self.inner.param_groups, self._model_params, strict=True):
            by_kind: dict[tuple[torch.dtype, str], list[nn.Parameter]] = {}
            for p in sorted((p for p in params if p.requires_grad), key=lambda p: order.get(id(p), 0)):
                kind = kinds.get(names.get(id(p), ""), "dense")
                by_kind.setdefault((p.dtype, kind), []).append(p)
            made = [
                FlatBuffer(
                    ps,
                    [names.get(id(p), "") for p in ps],
                    groups[kind],
                    shard=self.shard,
                    bucket_numel=self.bucket_numel,
                    grad_as_view=self.grad_as_view,
                )
                for (_, kind), ps in by_kind.items()
            ]
            options["params"] = [s for buffer in made for s in buffer.shards]
            self.buffers += made
        self.inner.state.clear()
        self._plan_reductions(order)

    def _plan_reductions(self, order: Mapping[int, int]) -> None:
        """Fix one order of buckets for all ranks: by when backward (last parameter first) completes them."""
        self._home: dict[int, tuple[FlatBuffer, int]] = {}
        first_param: dict[tuple[int, int], int] = {}
        for i, buffer in enumerate(self.buffers):
            for slot in buffer.layout.slots:
                param = buffer.params[slot.index]
                self._home[id(param)] = (buffer, slot.bucket)
                position = order.get(id(param), 0)
                first_param[i, slot.bucket] = min(position, first_param.get((i, slot.bucket), position))
                self._hooks.append(param.register_post_accumulate_grad_hook(self._on_grad_ready))
        self._sequence = [(self.buffers[i], b) for (i, b), _ in sorted(first_param.items(), key=lambda kv: -kv[1])]
        self._launching = False
        self._reset_reductions()

    def _reset_reductions(self) -> None:
        self._missing = {
            (id(buffer), b): sum(slot.bucket == b for slot in buffer.layout.slots) for buffer, b in self._sequence
        }
        self._seen: set[int] = set()
        self._works: list[dist.Work | None] = []

    def _on_grad_ready(self, param: nn.Parameter) -> None:
        if self._launching and id(param) not in self._seen:
            self._seen.add(id(param))
            buffer, bucket = self._home[id(param)]
            self._missing[id(buffer), bucket] -= 1
            self._launch(only_complete=True)

    def _launch(self, *, only_complete: bool) -> None:
        # Strictly in sequence: ranks whose gradients come in another order must still agree on what is exchanged.
        while len(self._works) < len(self._sequence):
            buffer, bucket = self._sequence[len(self._works)]
            if only_complete and self._missing[id(buffer), bucket] > 0:
                return
            self._works.append(buffer.reduce_bucket(bucket))

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Around one micro-batch's backward; with ``last`` each bucket's reduction starts as soon as it is complete.

        Raises: ConfigError after the last backward if a parameter got no gradient, unless ``allow_unused``.
        """
        self._launching = last
        yield
        self._launching = False
        if last:
            unused = [
                n for b in self.buffers for n, p in zip(b.names, b.params, strict=True) if id(p) not in self._seen
            ]
            if unused and not self.allow_unused:
                raise ConfigError(
                    f"{len(unused)} parameters got no gradient in the last backward ({', '.join(unused[:3])}, ...); "
                    "use them in the loss, set requires_grad=False, or pass --ddp_find_unused_parameters"
                )
            self._launch(only_complete=False)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call ``backward`` on: multiplied by the loss scale (which is 1 except for fp16)."""
        return loss * self.loss_scale if self._growth_tracker is not None else loss

    @torch.no_grad()
    def step(self, max_norm: float = 0.0) -> torch.Tensor:
        """Reduce what is not reduced yet, clip to ``max_norm`` (0: no clipping), update, and gather the parameters.

        Returns the gradient norm before clipping, over the whole model, on the device: the host waits for nothing
        (unless ``inner`` is not a fused optimizer; then it looks whether the norm is finite). A non-finite norm skips
        the update on every rank alike and is counted in ``skipped_steps``. Collective.
        """
        self._launch(only_complete=False)
        for work in self._works:
            if work is not None:
                work.wait()
        self._reset_reductions()
        norm = self._grad_norm() / self.loss_scale
        skip = (~torch.isfinite(norm)).float()
        factor = 1.0 / self.loss_scale
        if max_norm > 0:
            factor = factor * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        grads = [s.grad for buffer in self.buffers for s in buffer.shards if s.grad is not None]
        for grad in grads:
            grad.mul_(factor)
        self._inner_step(skip)
        self.skipped_steps += skip
        if self._growth_tracker is not None:
            torch._amp_update_scale_(self.loss_scale, self._growth_tracker, skip, 2.0, 0.5, 2000)
        for buffer in self.buffers:
            buffer.publish()
        return norm

    def _inner_step(self, skip: torch.Tensor) -> None:
        if getattr(self.inner, "_step_supports_amp_scaling", False):
            self.inner.found_inf = skip  # type: ignore[attr-defined]  # fused kernels look at it on the device
            self.inner.grad_scale = None  # type: ignore[attr-defined]
            self.inner.step()
        elif not bool(skip):
            self.inner.step()

    def _grad_norm(self) -> torch.Tensor:
        """The norm over all parameters, each element counted once: every rank adds what it owns."""
        total = torch.zeros((), dtype=torch.float64, device=self.loss_scale.device)
        for buffer in self.buffers:
            norms = torch.stack([torch.linalg.vector_norm(s.grad) for s in buffer.shards if s.grad is not None])
            squares = norms.double().square().sum()
            if buffer.shard:
                dist.all_reduce(squares, op=dist.ReduceOp.SUM, group=buffer.group)
            total += squares
        return total.sqrt().to(self.buffers[0].main_dtype)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero all gradients. The buffers stay: ``set_to_none`` is accepted for compatibility and has no effect."""
        for buffer in self.buffers:
            buffer.attach_grads()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups: set ``group["lr"]`` here, as with any torch optimizer."""
        return self.inner.param_groups

    def pieces(self) -> Iterator[Piece]:
        """Every owned part of every parameter, with its main copy; its optimizer states are in ``inner.state``."""
        for buffer in self.buffers:
            yield from buffer.pieces()

    def refresh_shards(self) -> None:
        """Set the fp32 main copies from the model's parameters, after those were written from outside."""
        for buffer in self.buffers:
            buffer.refresh_shards()

    def bytes_per_rank(self) -> dict[str, int]:
        """Bytes this rank holds: parameters, gradients, and the shards with their optimizer states."""
        states = [v for state in self.inner.state.values() for v in state.values() if torch.is_tensor(v)]
        separate = [s for b in self.buffers for s in b.shards if b.param_data.dtype != b.main_dtype]
        return {
            "parameters": sum(b.param_data.nbytes for b in self.buffers),
            "gradients": sum(b.grad_data.nbytes for b in self.buffers),
            "main": sum(s.nbytes for s in separate),
            "optimizer": sum(math.prod(v.shape) * v.element_size() for v in states),
        }
