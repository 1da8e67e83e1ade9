"""Reading a checkpoint back, on any number of processes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.checkpoint.files import CheckpointFiles, damaged, verify
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.distributed.collectives import together
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.param_spec import specs_of
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.errors import CheckpointError
from tinytron.utils.training import set_rng_state


def read_file(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """``torch.load`` with plain types only; with ``mmap`` tensors are read where they are used.

    Raises: CheckpointError if the file is missing or damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged pickles raise all sorts
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, f"it holds a {type(content).__name__}, not a dict")
    return content


def read_meta(path: Path) -> CheckpointMeta:
    """The metadata of a checkpoint. It vouches for the other files, so its own checksums, those of a zip archive, which
    ``torch.load`` takes on trust, are compared first. Raises: CheckpointError if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # damaged archives raise all sorts
        raise damaged(path, error) from error
    if broken is not None:
        raise damaged(path, f"the checksum of its part {broken} is wrong")
    return CheckpointMeta.from_dict(read_file(path))


def first_undamaged(
    found: Sequence[CheckpointFiles], group: dist.ProcessGroup, warn: Callable[[str], None]
) -> tuple[CheckpointFiles, CheckpointMeta]:
    """The first of ``found`` whose files are what was written, and its metadata; ``warn`` hears of those passed over.
    Collective.

    Raises: CheckpointError on every rank if all are damaged: starting from nothing is a decision for the user.
    """
    errors: list[CheckpointError] = []
    for files in found:
        try:
            return files, read_verified(files, group)
        except CheckpointError as error:
            errors.append(error)
            if len(errors) < len(found):
                warn(f"error: {error}; using the checkpoint before")
    raise CheckpointError(
        f"{errors[0]}; no undamaged checkpoint is left in {found[0].folder}: restore one, or pass --no-resume to start anew"
    )


def read_verified(files: CheckpointFiles, group: dist.ProcessGroup) -> CheckpointMeta:
    """The metadata of a checkpoint whose files all are what was written; each rank reads a part of them. Collective.

    Raises: CheckpointError on every rank, naming the first file that is not.
    """
    meta = together(lambda: read_meta(files.meta), group)
    mine = sorted(meta.files)[dist.get_rank(group) :: dist.get_world_size(group)]
    together(lambda: verify(files.folder, meta.files, mine), group)
    return meta


def load_checkpoint(
    files: CheckpointFiles,
    meta: CheckpointMeta,
    model: nn.Module,
    optimizer: DistributedOptimizer,
    state: ParallelState,
) -> None:
    """Restore weights, main weights, optimizer states and random states; ``meta`` is what ``files.meta`` holds.
    Collective.

    A rank that the saving run did not have keeps its fresh random state. Raises: CheckpointError on every rank if a file
    is damaged or the model does not fit.
    """
    from tinytron.checkpoint.optimizer_state import load_optimizer_state  # torch's DCP takes a second to import

    world = state.groups["world"]
    together(lambda: load_weights(model, read_file(files.model), str(files.model), state), world)
    optimizer.refresh_shards()
    load_optimizer_state(optimizer, files.optimizer, world)
    optimizer.load_counters(meta.counters)
    rank = dist.get_rank(world)
    if rank < len(meta.rng):
        set_rng_state(meta.rng[rank])


def load_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], source: str, state: ParallelState | None = None
) -> None:
    """Copy ``weights``, those of the whole model, into ``model`` in place; with ``state`` this rank's experts only.

    Raises: CheckpointError naming missing, unknown and misshapen tensors.
    """
    own = model.state_dict()
    if state is not None:
        cut = {spec.name for spec in specs_of(model) if spec.shard_axis is not None} & weights.keys()
        part, parts = state.group_rank("ep"), state.layout.ep
        whole = {name: len(weights[name]) == parts * len(own[name]) for name in cut}
        weights = weights | {name: weights[name].chunk(parts)[part] for name in cut if whole[name]}
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
