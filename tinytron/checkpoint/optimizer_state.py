"""An optimizer's main weights and states by parameter name, independent of who owned which part.

Keys: ``<parameter>/main`` (fp32 master weights), ``<parameter>/<state>`` (such as ``exp_avg``) and
``<parameter>/scalar.<state>`` (such as Adam's ``step``).
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tinytron.checkpoint.sharded import FlatLoadPlanner, FlatRange, FlatSavePlanner
from tinytron.distributed.collectives import together
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.errors import CheckpointError

_MAIN, _SCALAR = "main", "scalar."


def save_optimizer_state(optimizer: DistributedOptimizer, folder: Path, group: dist.ProcessGroup) -> None:
    """Write every owned part to ``folder``. Collective over ``group``."""
    tensors: dict[str, FlatRange] = {}
    for piece in optimizer.pieces():
        length = len(piece.main)
        tensors[f"{piece.name}/{_MAIN}"] = FlatRange(piece.numel, piece.offset, piece.main)
        for key, value in optimizer.inner.state[piece.holder].items():
            if not torch.is_tensor(value):
                continue
            if value.ndim > 0:
                part = value[piece.start : piece.start + length]
                tensors[f"{piece.name}/{key}"] = FlatRange(piece.numel, piece.offset, part)
            elif piece.offset == 0:  # stored by the owner of the parameter's first element
                tensors[f"{piece.name}/{_SCALAR}{key}"] = FlatRange(1, 0, value.reshape(1))
    dcp.save(
        dict(tensors),
        storage_writer=dcp.FileSystemWriter(folder),
        planner=FlatSavePlanner(tensors),
        process_group=group,
    )


def load_optimizer_state(optimizer: DistributedOptimizer, folder: Path, group: dist.ProcessGroup) -> None:
    """Read this rank's parts, whatever layout wrote them, and create the states they belong to. Collective.

    Raises: CheckpointError on every rank if the folder is damaged, lacks a parameter or has it in another size.
    """
    wanted = together(lambda: _prepare(optimizer, _stored(folder), folder), group)
    try:
        dcp.load(
            dict(wanted),
            storage_reader=dcp.FileSystemReader(folder),
            planner=FlatLoadPlanner(wanted),
            process_group=group,
        )
    except dcp.api.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(
            f"{folder} cannot be read ({first}); remove this checkpoint to use the one before"
        ) from error


def _stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder}/.metadata cannot be read ({error}); remove this checkpoint") from error
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _prepare(
    optimizer: DistributedOptimizer, stored: dict[str, TensorStorageMetadata], folder: Path
) -> dict[str, FlatRange]:
    """The memory to read into. Which states exist is learned from the checkpoint: a fresh optimizer has none yet."""
    keys: dict[str, list[str]] = {}
    for name in stored:
        parameter, key = name.rsplit("/", 1)
        keys.setdefault(parameter, []).append(key)
    wanted: dict[str, FlatRange] = {}
    for piece in optimizer.pieces():
        if piece.name not in keys:
            raise CheckpointError(
                f"{folder} has no optimizer state of {piece.name}: it is of another model or optimizer"
            )
        state = optimizer.inner.state[piece.holder]
        for key in keys[piece.name]:
            name = f"{piece.name}/{key}"
            size, dtype = stored[name].size.numel(), stored[name].properties.dtype
            if key.startswith(_SCALAR):  # parameters of one bucket share the scalar; they all store the same value
                scalar = state.setdefault(
                    key.removeprefix(_SCALAR), torch.zeros((), dtype=dtype, device=piece.main.device)
                )
                wanted[name] = FlatRange(1, 0, scalar.reshape(1))
                continue
            if size != piece.numel:
                raise CheckpointError(f"{folder}: {name} has {size} elements, this model's parameter {piece.numel}")
            part = piece.main
            if key != _MAIN:
                whole = state.setdefault(key, torch.zeros_like(piece.holder.data, dtype=dtype))
                part = whole[piece.start : piece.start + len(piece.main)]
            wanted[name] = FlatRange(piece.numel, piece.offset, part)
    return wanted
