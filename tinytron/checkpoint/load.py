"""Reading a checkpoint back, on any number of processes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.checkpoint.files import CheckpointFiles
from tinytron.checkpoint.optimizer_state import load_optimizer_state
from tinytron.distributed.collectives import together
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.errors import CheckpointError
from tinytron.utils.training import set_rng_state


def read_file(path: Path) -> Any:
    """``torch.load`` with plain types only. Raises: CheckpointError if the file is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read ({reason}); remove this checkpoint to use the one before"
        ) from error


def load_checkpoint(
    files: CheckpointFiles,
    meta: dict[str, Any],
    model: nn.Module,
    optimizer: DistributedOptimizer,
    state: ParallelState,
) -> None:
    """Restore weights, main weights, optimizer states and random states; ``meta`` is what ``files.meta`` holds.
    Collective.

    A rank that the saving run did not have keeps its fresh random state. Raises: CheckpointError on every rank if a file
    is damaged or the model does not fit.
    """
    world = state.groups["world"]
    together(lambda: load_weights(model, read_file(files.model), str(files.model)), world)
    optimizer.refresh_shards()
    load_optimizer_state(optimizer, files.optimizer, world)
    rank = dist.get_rank(world)
    if rank < len(meta["rng"]):
        set_rng_state(meta["rng"][rank])


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Copy ``weights`` into ``model`` in place. Raises: CheckpointError naming missing, unknown and misshapen tensors."""
    own = model.state_dict()
    problems = [f"{n} is missing" for n in own.keys() - weights.keys()]
    problems += [f"{n} is unknown to this model" for n in weights.keys() - own.keys()]
    problems += [
        f"{n} is {list(weights[n].shape)}, this model's {list(own[n].shape)}"
        for n in own.keys() & weights.keys()
        if own[n].shape != weights[n].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        raise CheckpointError(
            f"{source} is of a different model ({len(problems)} differences): {shown}; use the flags it was trained with"
        )
    model.load_state_dict(weights)
