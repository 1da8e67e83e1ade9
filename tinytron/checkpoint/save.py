"""Writing a checkpoint: weights and states first, metadata last."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.checkpoint.files import CheckpointFiles
from tinytron.checkpoint.mirror import Mirror
from tinytron.distributed.collectives import together
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.param_spec import specs_of
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.utils.training import rng_state, write_atomically


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: DistributedOptimizer,
    meta: dict[str, Any],
    state: ParallelState,
    mirror: Mirror | None = None,
) -> CheckpointFiles:
    """Save ``step``; ``meta`` plus the random states of all ranks becomes the commit record. Collective. With ``mirror``
    the checkpoint is copied to where it points, too.

    Until ``*_meta.pt`` is in place the checkpoint does not exist for a reader; an older one of the same step stops
    existing before its parts are overwritten. Raises: TinytronError on every rank if the disk refuses.
    """
    from tinytron.checkpoint.optimizer_state import save_optimizer_state  # torch's DCP takes a second to import

    files, world = CheckpointFiles(folder, step), state.groups["world"]
    together(lambda: _clear(files) if state.is_master else None, world)
    if mirror is not None and state.is_master:
        mirror.remove_checkpoint(step)  # before anybody pushes parts: the others wait in the next line
    states: list[Any] = [None] * dist.get_world_size(world)
    dist.all_gather_object(states, rng_state(), group=world)
    weights = consolidated_weights(model, state)
    together(lambda: _write(files.model, weights) if state.is_master else None, world)
    save_optimizer_state(optimizer, files.optimizer, world)
    if mirror is not None:
        mirror.push_checkpoint_parts(files.names_written_by(state.rank))
    record = {**meta, "step": step, "rng": states, "counters": optimizer.counters()}
    together(lambda: _write(files.meta, record) if state.is_master else None, world)  # all have pushed
    if mirror is not None and state.is_master:
        mirror.push_commit(step)
    return files


def consolidated_weights(model: nn.Module, state: ParallelState) -> dict[str, torch.Tensor]:
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
            weights[name] = copies.setdefault(place, tensor.detach().to("cpu", copy=True))
    return weights


def _clear(files: CheckpointFiles) -> None:
    files.meta.unlink(missing_ok=True)
    shutil.rmtree(files.optimizer, ignore_errors=True)


def _write(path: Path, content: Any) -> None:
    write_atomically(path, lambda file: torch.save(content, file))
