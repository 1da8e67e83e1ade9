"""A copy of everything a checkpoint holds, in host memory: training goes on while it is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.checkpoint.files import CheckpointFiles
from tinytron.checkpoint.host_buffers import HostBuffers
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.param_spec import specs_of
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.utils.training import rng_state


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint. ``weights`` is empty on all but the master; ``states`` maps the keys of
    ``optimizer_state`` to this rank's ranges."""

    files: CheckpointFiles
    weights: dict[str, torch.Tensor]
    states: dict[str, Any]
    meta: CheckpointMeta
    rng: dict[str, Any]


def take_snapshot(
    files: CheckpointFiles,
    model: nn.Module,
    optimizer: DistributedOptimizer,
    meta: CheckpointMeta,
    state: ParallelState,
    buffers: HostBuffers,
) -> Snapshot:
    """Copy what ``files`` will hold, and complete ``meta`` with what only the copies tell. Collective; the host waits for
    the device."""
    from tinytron.checkpoint.optimizer_state import owned_states  # torch's DCP takes a second to import

    weights = consolidated_weights(model, state, buffers)
    states = owned_states(optimizer, buffers)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = {spec.name: list(spec.shape) for spec in specs_of(model) if spec.name in trained}
    meta = replace(meta, step=files.step, counters=optimizer.counters(), parameters=shapes)
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)  # the copies above were only queued
    return Snapshot(files, weights, states, meta, rng_state())


def consolidated_weights(model: nn.Module, state: ParallelState, buffers: HostBuffers) -> dict[str, torch.Tensor]:
    """``state_dict`` of the whole model, on the master: all experts, tied tensors tied, as CPU tensors of their own
    (parameters are views of large buffers). Collective over the master's expert group; empty on other ranks."""
    cut = {spec.name for spec in specs_of(model) if spec.shard_axis is not None}
    group, weights = state.groups["ep"], {}
    with_master = state.layout.ranks("edp")[state.group_rank("ep")][0] == state.rank
    copies: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr()  # of the parameter: one gathered below may get the memory of the one before
        if name in cut and with_master and state.layout.ep > 1:
            parts = [torch.empty_like(tensor) for _ in range(state.layout.ep)]
            dist.all_gather(parts, tensor.contiguous(), group=group)
            tensor = torch.cat(parts)
        if state.is_master:
            if place not in copies:
                copies[place] = buffers.copy(f"model/{name}", tensor)
            weights[name] = copies[place]
    return weights
