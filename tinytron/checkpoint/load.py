"""Reading a checkpoint back, on any number of processes."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.checkpoint.files import CheckpointFiles, damaged, verify
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.distributed.agreement import agree
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.param_spec import specs_of
from tinytron.distributed.sharding import box_of
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.errors import CheckpointError
from tinytron.model.lora import is_adapter
from tinytron.utils.training import set_rng_state


def read_file(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """``torch.load`` restricted to plain types; with ``mmap`` a tensor is read from disk when it is used.

    Raises: CheckpointError if the file is missing or damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged pickles raise all kinds of exceptions
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, f"it holds a {type(content).__name__}, not a dict")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises: CheckpointError if the file is missing or holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def read_meta(path: Path) -> CheckpointMeta:
    """Read the metadata of a checkpoint. It vouches for the other files, so this first verifies the checksums in its own
    zip archive, which ``torch.load`` does not check. Raises: CheckpointError if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # damaged archives raise all kinds of exceptions
        raise damaged(path, error) from error
    if broken is not None:
        raise damaged(path, f"the checksum of {broken} in it is wrong")
    return CheckpointMeta.from_dict(read_file(path))


def first_undamaged(
    found: Sequence[CheckpointFiles], group: dist.ProcessGroup, warn: Callable[[str], None]
) -> tuple[CheckpointFiles, CheckpointMeta]:
    """The first undamaged checkpoint of ``found`` and its metadata; calls ``warn`` for every one it skips. Collective.

    Raises: CheckpointError on every rank if all are damaged: starting from scratch is a decision for the user.
    """
    errors: list[CheckpointError] = []
    for files in found:
        try:
            return files, read_verified(files, group)
        except CheckpointError as error:
            errors.append(error)
            if len(errors) < len(found):
                warn(f"error: {error}; using the previous checkpoint")
    raise CheckpointError(
        f"{errors[0]}; no undamaged checkpoint is left in {found[0].folder}: restore one, or pass --no-resume to start over"
    )


def read_verified(files: CheckpointFiles, group: dist.ProcessGroup) -> CheckpointMeta:
    """Verify every file of a checkpoint, each rank a share of them, and return the metadata. Collective.

    Raises: CheckpointError on every rank, naming the first damaged file.
    """
    meta = agree(lambda: read_meta(files.meta), group)
    mine = sorted(meta.files)[dist.get_rank(group) :: dist.get_world_size(group)]
    agree(lambda: verify(files.folder, meta.files, mine), group)
    return meta


def load_checkpoint(
    files: CheckpointFiles,
    meta: CheckpointMeta,
    model: nn.Module,
    optimizer: DistributedOptimizer,
    state: ParallelState,
) -> None:
    """Restore weights, main weights, optimizer states and random states; ``meta`` is the content of ``files.meta``.
    Collective.

    The states of a different optimizer class are skipped (``other_optimizer``). A rank that the saving run did not have
    keeps its fresh random state. Raises: CheckpointError on every rank if a file is damaged or the model does not fit.
    """
    from tinytron.checkpoint.optimizer_state import load_optimizer_state  # torch's DCP takes a second to import

    world = state.groups["world"]

    def read_weights() -> dict[str, torch.Tensor]:
        weights = read_file(files.model)
        load_weights(model, weights, str(files.model), state)
        return weights

    weights = agree(read_weights, world)
    optimizer.refresh_shards()
    fresh = bool(other_optimizer(meta, optimizer))
    load_optimizer_state(optimizer, files.optimizer, world, weights, meta.parameters, main_only=fresh)
    optimizer.load_counters(meta.counters)
    rank = dist.get_rank(world)
    if rank < len(meta.rng):
        set_rng_state(meta.rng[rank])


def other_optimizer(meta: CheckpointMeta, optimizer: DistributedOptimizer) -> str | None:
    """The class name of the checkpoint's optimizer if it differs from that of ``optimizer``, which then cannot use the
    saved states; else ``None``."""
    return None if meta.optimizer in (None, type(optimizer.inner).__name__) else meta.optimizer


def load_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], source: str, state: ParallelState | None = None
) -> None:
    """Copy ``weights``, which cover the whole model, into ``model`` in place; with ``state`` only this rank's shards. Where
    ``weights`` have no adapters, those of ``model`` keep their values.

    Raises: CheckpointError naming missing tensors, unknown tensors and tensors of the wrong shape.
    """
    if not any(is_adapter(name) for name in weights):
        weights = {**weights, **{name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    cut = {id(model.get_parameter(spec.name)): spec for spec in specs_of(model) if spec.shards and state is not None}
    named = model.named_parameters(remove_duplicate=False)  # lists tied parameters under every name
    boxes = {name: box_of(cut[id(parameter)], state) for name, parameter in named if id(parameter) in cut}
    shapes |= {name: box.shape for name, box in boxes.items()}
    problems = [f"{n} is missing" for n in shapes.keys() - weights.keys()]
    problems += [f"{n} is unknown to this model" for n in weights.keys() - shapes.keys()]
    problems += [
        f"{n} is {list(weights[n].shape)}, but {list(shapes[n])} in this model"
        for n in shapes.keys() & weights.keys()
        if shapes[n] != tuple(weights[n].shape)
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        raise CheckpointError(
            f"{source} is from a different model ({len(problems)} differences): {shown}; use the flags it was trained with"
        )
    model.load_state_dict(weights | {name: box.cut(weights[name]) for name, box in boxes.items()})
