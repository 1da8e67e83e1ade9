"""Writing a checkpoint: weights and states first, metadata last."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.checkpoint.files import CheckpointFiles
from tinytron.checkpoint.optimizer_state import save_optimizer_state
from tinytron.distributed.collectives import together
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.utils.training import rng_state, write_atomically


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: DistributedOptimizer,
    meta: dict[str, Any],
    state: ParallelState,
) -> CheckpointFiles:
    """Save ``step``; ``meta`` plus the random states of all ranks becomes the commit record. Collective.

    Until ``*_meta.pt`` is in place the checkpoint does not exist for a reader; an older one of the same step stops
    existing before its parts are overwritten. Raises: TinytronError on every rank if the disk refuses.
    """
    files, world = CheckpointFiles(folder, step), state.groups["world"]
    together(lambda: _clear(files) if state.is_master else None, world)
    states: list[Any] = [None] * dist.get_world_size(world)
    dist.all_gather_object(states, rng_state(), group=world)
    together(lambda: _write(files.model, consolidated_weights(model)) if state.is_master else None, world)
    save_optimizer_state(optimizer, files.optimizer, world)
    record = {**meta, "step": step, "rng": states}
    together(lambda: _write(files.meta, record) if state.is_master else None, world)
    return files


def consolidated_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """``state_dict`` as CPU tensors of their own (parameters are views of large buffers); tied ones stay tied."""
    copies: dict[int, torch.Tensor] = {}
    return {
        name: copies.setdefault(tensor.data_ptr(), tensor.detach().to("cpu", copy=True))
        for name, tensor in model.state_dict().items()
    }


def _clear(files: CheckpointFiles) -> None:
    files.meta.unlink(missing_ok=True)
    shutil.rmtree(files.optimizer, ignore_errors=True)


def _write(path: Path, content: Any) -> None:
    write_atomically(path, lambda file: torch.save(content, file))
