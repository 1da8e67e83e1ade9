"""A wrapper for any torch optimizer that sums gradients over ranks and, by default, shards its states (ZeRO-1).

    backward -> .grad (view of the flat fp32 buffer) -> bucket full: asynchronous reduce-scatter of the SUM
    step     -> norm of the owned ranges, summed over ranks -> clip -> inner step on fp32 shards -> all-gather

Sources: ZeRO (arXiv:1910.02054, section 5); bucketed overlap as in PyTorch DDP (arXiv:2006.15704, section 3.2).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.distributed.collectives import Work
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.param_spec import ParamSpec
from tinytron.distributed.sharding import box_of
from tinytron.distributed.zero1.assignment import assignment_table, check_assignment
from tinytron.distributed.zero1.averages import swap_averages, update_averages
from tinytron.distributed.zero1.flat_buffer import BufferParam, FlatBuffer, OwnedSlice, Ownership
from tinytron.distributed.zero1.grouping import BufferGroup, group_parameters
from tinytron.distributed.zero1.norms import TensorNorms
from tinytron.distributed.zero1.schedule import Bucket, ParamGather, ReductionSchedule
from tinytron.errors import ConfigError
from tinytron.utils.phases import EXCHANGE, UPDATE, phase


@dataclass(frozen=True)
class Options:
    """Options of a ``DistributedOptimizer``.

    ``shard=False`` keeps whole states on every rank (all-reduce instead of reduce-scatter and all-gather).
    ``bucket_size_mb`` is the volume of gradients exchanged at a time. ``overlap_grad_reduce`` starts a bucket's exchange
    during the last backward pass. With ``overlap_param_gather``, ``step`` returns while parameters are still being gathered
    (see ``finish_gather``). ``reduce_dtype`` is the precision of gradients on the wire. ``grad_as_view=False`` lets
    autograd allocate gradients, which are then copied into the buffers. ``allow_unused`` accepts parameters without a
    gradient (they count as zero). ``loss_scaling`` guards fp16 gradients against underflow. ``ema_decay`` keeps exponential
    moving averages of the weights (see ``averaged``; 0: none).
    """

    shard: bool = True
    bucket_size_mb: float = 64.0
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = False
    reduce_dtype: torch.dtype | None = None
    grad_as_view: bool = True
    allow_unused: bool = False
    loss_scaling: bool = False
    ema_decay: float = 0.0

    @property
    def bucket_numel(self) -> int:
        """Number of fp32 gradients in a bucket."""
        return int(self.bucket_size_mb * 2**20) // 4


class DistributedOptimizer:
    """Wraps ``optimizer`` (any element-wise ``torch.optim.Optimizer``) for the ranks of ``process_group``.

    The optimizer's parameters move into flat buffers (they stay the same ``nn.Parameter`` objects). Its parameter groups
    then hold this rank's fp32 shards and keep their options (``lr``, ``weight_decay``, ...). In a group with the option
    ``kind="muon"`` ranks own whole tensors instead of elements, and shards keep their shapes. Scale each loss so that the
    *sum* over all ranks and micro-batches is the gradient you want: nothing is averaged.

        with optimizer.accumulate(last=True):
            loss.backward()
        grad_norm = optimizer.step(max_norm=1.0)
        optimizer.zero_grad()

    ``options`` are fields of ``Options``; fields that are not given come from the trainer (``attach``), or else have their
    defaults. The buffers are built on first use or by ``attach``; both are collective.

    ``ranks_map`` (the rank of each part of the states) and ``num_parts`` are checked against ``process_group``: part i
    belongs to its i-th rank. ``verbose`` prints what each rank owns once the buffers are built. Raises: ConfigError for
    another assignment.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        process_group: dist.ProcessGroup | None = None,
        ranks_map: Mapping[int, int] | Sequence[int] | None = None,
        num_parts: int | None = None,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        self.inner, self._given = optimizer, options
        self.options = Options(**options)
        group = process_group if process_group is not None else dist.group.WORLD
        assert group is not None, "initialize the process group before DistributedOptimizer"
        check_assignment(group, ranks_map, num_parts)
        self._verbose = verbose
        self._model_params: list[list[nn.Parameter]] = [list(g["params"]) for g in optimizer.param_groups]
        self._state = ParallelState.of_group(group, self._model_params[0][0].device)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._buffers: list[FlatBuffer] = []
        self.tensor_norms: TensorNorms | None = None  # measures each step while it is set
        self._gather = ParamGather([])
        self._reset_counters()

    def prepare(self) -> None:
        """Build the flat buffers, if they do not exist, of an optimizer that is used without ``attach``. Collective."""
        if not self._buffers:
            flat = [p for params in self._model_params for p in params]
            self._build({id(p): f"param{i}" for i, p in enumerate(flat)}, {})

    @property
    def buffers(self) -> list[FlatBuffer]:
        """The flat buffers, in the order of the optimizer's groups; builds them if necessary (``prepare``)."""
        self.prepare()
        return self._buffers

    def attach(
        self,
        model: nn.Module,
        specs: Sequence[ParamSpec],
        state: ParallelState,
        options: Options | None = None,
    ) -> None:
        """Take the parameters' names and their sharding over the ranks of ``state``, and build the buffers. Collective.

        ``state`` replaces ``process_group``, so a wrapper that was created with the data-parallel group is right on any
        layout. ``options`` supplies the fields that the constructor was not given. Raises: ConfigError if the optimizer
        misses a trainable parameter of ``model``.
        """
        if options is not None:
            self.options = dataclasses.replace(options, **self._given)
        names = {id(p): name for name, p in model.named_parameters()}
        ours = {id(p) for params in self._model_params for p in params}
        missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
        if missing:
            raise ConfigError(
                f"the optimizer does not update {len(missing)} trainable parameters ({', '.join(missing[:3])}, ...); "
                "build it from self.raw_model.parameters(), or set requires_grad=False on them"
            )
        self._state = state
        self._build(names, {spec.name: spec for spec in specs})

    def replace_inner(self, optimizer: torch.optim.Optimizer) -> None:
        """Wrap another ``optimizer``, such as one for other parameters, with fresh states; call ``attach`` next."""
        self.inner = optimizer
        self._model_params = [list(group["params"]) for group in optimizer.param_groups]

    def _build(self, names: Mapping[int, str], specs: Mapping[str, ParamSpec]) -> None:
        for hook in self._hooks:
            hook.remove()
        self.finish_gather()
        buffers: list[FlatBuffer] = []
        for options, params in zip(self.inner.param_groups, self._model_params, strict=True):
            made = [
                FlatBuffer(
                    _members(group, self._state),
                    self._ownership(group.axes, group.whole_tensors),
                    bucket_numel=self.options.bucket_numel,
                    grad_as_view=self.options.grad_as_view,
                )
                for group in group_parameters(params, options, names, specs)
            ]
            options["params"] = [s for buffer in made for s in buffer.shards]
            buffers += made
        self._buffers = buffers
        self.inner.state.clear()
        self._reset_counters()
        self._plan_reductions({key: i for i, key in enumerate(names)})
        if self._verbose and self._state.is_master:
            print(assignment_table(buffers), flush=True)

    def _reset_counters(self) -> None:
        device = self._model_params[0][0].device
        scaling = self.options.loss_scaling
        self.loss_scale = torch.tensor(65536.0 if scaling else 1.0, device=device)
        self._growth_tracker = torch.zeros((), dtype=torch.int32, device=device) if scaling else None
        self.skipped_steps = torch.zeros((), device=device)

    def _ownership(self, axes: tuple[str, ...], whole_tensors: bool) -> Ownership:
        """The ownership of parameters that are cut over ``axes``; each of their elements counts once in the norm."""
        layout, groups = self._state.layout, self._state.groups
        norm_group: dist.ProcessGroup | None = groups["world"]  # every rank owns different elements
        if not self.options.shard:  # replicas own the same elements
            norm_group = groups[layout.pieces(axes)] if axes else None
        group = groups[layout.replicas(axes)]
        return Ownership(axes, group, self.options.shard, whole_tensors, norm_group, self.options.reduce_dtype)

    def _plan_reductions(self, order: Mapping[int, int]) -> None:
        """Register a hook on every parameter that fires when its gradient is ready. ``order`` maps a parameter's id to its
        place in registration order."""
        positions: dict[Bucket, list[int]] = {}
        for i, buffer in enumerate(self._buffers):
            for slot in buffer.layout.slots:
                param = buffer.params[slot.index]
                positions.setdefault((i, slot.bucket), []).append(order.get(id(param), 0))
                ready = partial(_call_if_alive, weakref.WeakMethod(self._on_grad_ready), (i, slot.bucket), slot.index)
                self._hooks.append(param.register_post_accumulate_grad_hook(ready))
        self._schedule = ReductionSchedule(positions)
        self._gather = ParamGather(self._buffers)
        self._launching = False
        self._works: list[Work] = []

    def _on_grad_ready(self, bucket: Bucket, member: int) -> None:
        buffer = self._buffers[bucket[0]]
        if buffer.grad_as_view:
            buffer.take_grad(member)
        if self._launching:
            self._schedule.arrive(bucket, member)
            if self.options.overlap_grad_reduce:
                self._launch(only_complete=True)

    def _launch(self, *, only_complete: bool) -> None:
        for i, bucket in self._schedule.due(only_complete=only_complete):
            self._works.append(self._buffers[i].reduce_bucket(bucket))

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Context for one micro-batch's backward pass; with ``last``, each bucket's reduction starts once it is complete.

        Raises: ConfigError after the last backward pass if a parameter got no gradient, unless ``allow_unused``.
        """
        self.prepare()
        self._launching = last
        yield
        self._launching = False
        if last:
            unused = [
                member.name
                for i, buffer in enumerate(self._buffers)
                for m, member in enumerate(buffer.members)
                if not self._schedule.has(i, m)
            ]
            if unused and not self.options.allow_unused:
                raise ConfigError(
                    f"{len(unused)} parameters got no gradient in the last backward ({', '.join(unused[:3])}, ...); "
                    "use them in the loss, set requires_grad=False, or pass --ddp_find_unused_parameters"
                )
            self._launch(only_complete=False)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call ``backward`` on, multiplied by the loss scale (which is 1 except for fp16)."""
        return loss * self.loss_scale if self._growth_tracker is not None else loss

    @torch.no_grad()
    def step(self, max_norm: float = 0.0, reject: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Reduce the remaining buckets, clip to ``max_norm`` (0: no clipping), update, and gather the parameters.

        Returns the gradient norm of the whole model before clipping, on the device: the host does not wait (except when
        ``inner`` is not fused, or has no states yet; then the host checks that the norm is finite). A non-finite norm skips
        the update on every rank and is counted in ``skipped_steps``. So does a true ``reject(norm)``, a device scalar that
        must be the same on all ranks. Collective.
        """
        self.prepare()  # has work to do only if ``accumulate`` was not used; keeps existing gradients
        with phase(EXCHANGE):
            self._launch(only_complete=False)
            for work in self._works:
                work.wait()
        self._works = []
        self._schedule.reset()
        norm = self._grad_norm() / self.loss_scale
        overflow = (~torch.isfinite(norm)).float()
        skip = overflow if reject is None else torch.maximum(overflow, reject(norm).float())
        factor = 1.0 / self.loss_scale
        if max_norm > 0:
            factor = factor * torch.clamp(max_norm / (norm + 1e-6), max=1.0).nan_to_num()  # padding stays zero
        measuring = contextlib.nullcontext() if self.tensor_norms is None else self.tensor_norms.of_step()
        with phase(UPDATE), measuring:
            for buffer in self.buffers:
                buffer.scale_grads(factor)
            self._inner_step(skip)
        self.skipped_steps += skip
        self.last_skipped = skip
        if self._growth_tracker is not None:
            torch._amp_update_scale_(self.loss_scale, self._growth_tracker, overflow, 2.0, 0.5, 2000)
        self.finish_gather()  # gathers of the last step that no forward pass has waited for
        # The next forward pass needs the buckets in the reverse of the order in which the backward pass filled them.
        self._gather.start(reversed(self._schedule.order))
        if not self.options.overlap_param_gather:
            self.finish_gather()
        return norm

    def finish_gather(self, params: Iterable[nn.Parameter] | None = None) -> None:
        """Wait until ``params`` (default: all) hold the last step's values. Call it before reading parameters directly; the
        model's forward pass waits by itself, block by block."""
        self._gather.finish(params)

    def _inner_step(self, skip: torch.Tensor) -> None:
        # Only with states: in a skipped first step fused SGD would create its momentum uninitialized (torch 2.13).
        if getattr(self.inner, "_step_supports_amp_scaling", False) and any(self.inner.state.values()):
            self.inner.found_inf = skip  # type: ignore[attr-defined]  # fused kernels read it on the device
            self.inner.grad_scale = None  # type: ignore[attr-defined]
            self.inner.step()
        elif bool(skip):
            return  # optimizers create their states only if there are none, so there may be no average before them
        else:
            self.inner.step()
        if self.options.ema_decay:
            update_averages(self.inner, self._shards(), self.options.ema_decay, skip)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the model computes with its averaged weights (``ema_decay``), or its own before there are any.
        After it, the weights are what they were, bit for bit. Collective."""
        self._swap_averages()
        yield
        self._swap_averages()

    def _swap_averages(self) -> None:
        self.finish_gather()
        swap_averages(self.inner, self._shards())
        self._gather.start(self._schedule.order)
        self.finish_gather()

    def _shards(self) -> Iterator[nn.Parameter]:
        for buffer in self.buffers:
            yield from buffer.shards

    def _grad_norm(self) -> torch.Tensor:
        """The gradient norm over all parameters. Every rank adds the elements it owns, so each counts once. Collective."""
        total = torch.stack([buffer.squared_norm() for buffer in self.buffers]).sum()
        return total.sqrt().to(self.buffers[0].main_dtype)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Drop all gradients; ``.grad`` is ``None`` until the next backward pass, regardless of ``set_to_none``."""
        for buffer in self.buffers:
            buffer.release_grads()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups; set ``group["lr"]`` here, as with any torch optimizer."""
        return self.inner.param_groups

    def pieces(self) -> Iterator[OwnedSlice]:
        """Every owned part of every parameter, with its main copy; the optimizer states are in ``inner.state``."""
        for buffer in self.buffers:
            yield from buffer.pieces()

    def counters(self) -> dict[str, float]:
        """The values that a checkpoint keeps in addition to the pieces: the loss scale, the number of good steps since it
        changed, and the number of skipped steps."""
        growth = 0.0 if self._growth_tracker is None else float(self._growth_tracker)
        return {"scale": float(self.loss_scale), "growth": growth, "skipped": float(self.skipped_steps)}

    def load_counters(self, saved: Mapping[str, float]) -> None:
        """Restore the values that ``counters`` returned."""
        self.skipped_steps.fill_(saved["skipped"])
        if self._growth_tracker is not None:
            self.loss_scale.fill_(saved["scale"])
            self._growth_tracker.fill_(int(saved["growth"]))

    def refresh_shards(self) -> None:
        """Set the fp32 main copies from the model's parameters; needed after other code has changed the parameters."""
        self.finish_gather()
        for buffer in self.buffers:
            buffer.refresh_shards()

    def bytes_per_rank(self) -> dict[str, int]:
        """Bytes that this rank holds: parameters, gradients, main copies and optimizer states."""
        states = [v for state in self.inner.state.values() for v in state.values() if torch.is_tensor(v)]
        separate = [s for b in self.buffers for s in b.shards if b.param_data.dtype != b.main_dtype]
        return {
            "parameters": sum(b.param_data.nbytes for b in self.buffers),
            "gradients": sum(b.grad_data.nbytes for b in self.buffers),
            "main": sum(s.nbytes for s in separate),
            "optimizer": sum(math.prod(v.shape) * v.element_size() for v in states),
        }


def _members(group: BufferGroup, state: ParallelState) -> list[BufferParam]:
    """The members of a buffer. Raises: ConfigError if a parameter's shape does not match its spec."""
    members = []
    for param, spec in zip(group.params, group.specs, strict=True):
        box = box_of(spec, state)
        if tuple(param.shape) != box.size:
            raise ConfigError(
                f"parameter {spec.name} has shape {list(param.shape)}, but according to its ParamSpec this rank holds "
                f"{list(box.size)} of {list(spec.shape)}; let param_specs() give the global shape and its shards"
            )
        members.append(BufferParam(param, spec.name, box))
    return members


def _call_if_alive(
    method: weakref.WeakMethod[Callable[[Bucket, int], None]], bucket: Bucket, member: int, _: Any
) -> None:
    """The hook of a parameter. With a strong reference it would be part of a cycle that is never freed."""
    if (alive := method()) is not None:
        alive(bucket, member)
