"""A copy in host memory of everything a checkpoint holds, so that training continues while it is written."""

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
from tinytron.distributed.sharding import Sharding
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.utils.training import rng_state


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint. ``weights`` is empty except on the master; ``states`` maps the keys of
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
    """Copy everything that ``files`` will hold, and fill in the fields of ``meta`` that depend on it. Collective; the host
    waits for the device."""
    from tinytron.checkpoint.optimizer_state import owned_states  # torch's DCP takes a second to import

    weights = consolidated_weights(model, state, buffers)
    states = owned_states(optimizer, model.state_dict(), buffers)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = {spec.name: list(spec.shape) for spec in specs_of(model) if spec.name in trained}
    kind = type(optimizer.inner).__name__
    meta = replace(meta, step=files.step, optimizer=kind, counters=optimizer.counters(), parameters=shapes)
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)  # the copies above were only queued
    return Snapshot(files, weights, states, meta, rng_state())


def consolidated_weights(model: nn.Module, state: ParallelState, buffers: HostBuffers) -> dict[str, torch.Tensor]:
    """``state_dict`` of the whole model on the master, with all experts; empty on other ranks.

    The tensors are CPU copies (parameters are views of large buffers), and tied tensors stay tied. Collective over the
    ranks that hold the other pieces of the master's sharded tensors.
    """
    shardings = {spec.name: Sharding.of(spec, state.layout) for spec in specs_of(model) if spec.shards}
    weights: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr()  # taken before gathering: gathered tensors may reuse each other's memory
        if name in shardings:
            tensor = _gathered(tensor, shardings[name], state)
        if state.is_master:
            if place not in copies:
                copies[place] = buffers.copy(f"model/{name}", tensor)
            weights[name] = copies[place]
    return weights


def _gathered(piece: torch.Tensor, sharding: Sharding, state: ParallelState) -> torch.Tensor:
    """The whole tensor on the master and the ranks that hold its other pieces; other ranks get ``piece`` back."""
    axis = state.layout.pieces(sharding.axes)
    holders = state.layout.group_of(0, axis)  # the master is rank 0
    if state.rank not in holders or len(holders) == 1:
        return piece
    pieces = [torch.empty_like(piece) for _ in holders]
    dist.all_gather(pieces, piece.contiguous(), group=state.groups[axis])
    return sharding.whole(pieces)
