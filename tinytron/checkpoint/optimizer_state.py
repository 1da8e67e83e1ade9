"""An optimizer's main weights and states by parameter name, independent of which rank owned which part.

Keys: ``<parameter>/main`` (fp32 master weights, unless the weights file has them in that precision),
``<parameter>/<state>`` (such as ``exp_avg``), ``<parameter>/scalar.<state>`` (such as Adam's ``step``) and
``<parameter>/<sizes>.<state>`` for a state whose size differs from its parameter's (such as ``64x1.second_moment`` for a
matrix with 64 rows; only in optimizers that own whole tensors).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tinytron.checkpoint.files import checksum, damaged
from tinytron.checkpoint.host_buffers import HostBuffers
from tinytron.checkpoint.sharded import FlatLoadPlanner, FlatRanges, FlatSavePlanner
from tinytron.distributed.agreement import agree
from tinytron.distributed.zero1.averages import AVERAGE
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.distributed.zero1.flat_buffer import OwnedSlice
from tinytron.errors import CheckpointError, first_line

MAIN, SCALAR = "main", "scalar."
_SIZES = re.compile(r"(\d+)x(\d+)\.(.+)")


def are_main(weight: torch.Tensor) -> bool:
    """True for weights in the precision of main weights, which are then not stored a second time."""
    return weight.dtype in (torch.float32, torch.float64)


def owned_states(
    optimizer: DistributedOptimizer, weights: Mapping[str, torch.Tensor], buffers: HostBuffers
) -> dict[str, FlatRanges]:
    """Copies of all states that this rank owns, by key, and of its main weights if ``weights``, the model's ``state_dict``,
    are less precise."""
    states: dict[str, FlatRanges] = {}
    for piece in optimizer.pieces():
        length = len(piece.main)
        runs = piece.runs
        if piece.name not in weights or not are_main(weights[piece.name]):
            states[f"{piece.name}/{MAIN}"] = FlatRanges(piece.numel, runs, piece.main)
        for key, value in optimizer.inner.state[piece.holder].items():
            if not torch.is_tensor(value):
                continue
            if value.ndim > 0 and value.numel() == piece.holder.numel():
                part = value.view(-1)[piece.start : piece.start + length]
                states[f"{piece.name}/{key}"] = FlatRanges(piece.numel, runs, part)
            elif value.ndim > 0:
                label = "x".join(str(size) for size in value.shape[-2:])
                states[f"{piece.name}/{label}.{key}"] = _other_size(piece, value)
            elif runs[0].offset == 0:  # only the owner of the parameter's first element stores the scalar
                states[f"{piece.name}/{SCALAR}{key}"] = FlatRanges.whole(value.reshape(1))
    return {key: replace(part, elements=buffers.copy(key, part.elements)) for key, part in states.items()}


def write_optimizer_state(states: dict[str, FlatRanges], folder: Path, group: dist.ProcessGroup) -> dict[str, Any]:
    """Write every rank's parts to ``folder`` and return the checksums of this rank's files, by name relative to the
    folder's parent. Collective over ``group``.

    Raises: CheckpointError on every rank if the disk refuses.
    """
    try:
        dcp.save(
            dict(states),
            storage_writer=dcp.FileSystemWriter(folder),
            planner=FlatSavePlanner(states),
            process_group=group,
        )
    except dcp.api.CheckpointException as error:
        raise CheckpointError(f"{folder} cannot be written ({_first_reason(error)})") from error
    rank = dist.get_rank(group)
    mine = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    return {f"{folder.name}/{path.name}": checksum(path) for path in mine}


def _other_size(piece: OwnedSlice, value: torch.Tensor) -> FlatRanges:
    """The ranges of a state whose size differs from its parameter's; the rank owns the whole parameter (or whole
    experts)."""
    box = piece.box.with_matrices(*value.shape[-2:])
    return FlatRanges(box.numel, box.runs(), value.view(-1))


def load_optimizer_state(
    optimizer: DistributedOptimizer,
    folder: Path,
    group: dist.ProcessGroup,
    weights: Mapping[str, torch.Tensor],
    trained: Collection[str],
    *,
    main_only: bool = False,
) -> None:
    """Read this rank's parts, whichever layout wrote them, and create the states they belong to; with ``main_only`` read
    only the main weights. ``weights`` are those of the same checkpoint, which may be the main weights, too, and ``trained``
    the names of its trained parameters. Collective.

    Raises: CheckpointError on every rank if the folder is damaged, lacks a parameter, or has it in a different size.
    """

    def prepare() -> dict[str, FlatRanges]:
        stored = stored_states(folder)
        if main_only:
            stored = {name: entry for name, entry in stored.items() if name.endswith(f"/{MAIN}")}
        return _prepare(optimizer, stored, weights, trained, folder)

    wanted = agree(prepare, group)
    read_states(wanted, folder, group)


def read_states(wanted: dict[str, FlatRanges], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Fill the ranges ``wanted`` from ``folder``, by key. Collective over ``group``; ``None``: this process reads alone.

    Raises: CheckpointError on every rank if the folder is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist asks for that
            dcp.load(
                dict(wanted),
                storage_reader=dcp.FileSystemReader(folder),
                planner=FlatLoadPlanner(wanted),
                process_group=group,
                no_dist=group is None,
            )
    except dcp.api.CheckpointException as error:
        raise damaged(folder, _first_reason(error)) from error


def _first_reason(error: dcp.api.CheckpointException) -> str:
    """The error of the first rank that failed, in one line."""
    reason = next(iter(error.failures.values()))[0]
    return first_line(reason)


def stored_states(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Size, precision and chunks of every tensor in ``folder``, by key. Raises: CheckpointError if it is damaged."""
    try:
        entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # damaged pickles raise all kinds of exceptions
        raise damaged(folder / ".metadata", error) from error
    return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def state_of(key: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the state stored under ``key`` (without the parameter's name) for a parameter of ``shape``."""
    if key.startswith(SCALAR):
        return key.removeprefix(SCALAR), ()
    if sizes := _SIZES.fullmatch(key):
        return sizes[3], (*shape[:-2], int(sizes[1]), int(sizes[2]))
    return key, shape


def _prepare(
    optimizer: DistributedOptimizer,
    stored: dict[str, TensorStorageMetadata],
    weights: Mapping[str, torch.Tensor],
    trained: Collection[str],
    folder: Path,
) -> dict[str, FlatRanges]:
    """The memory to read into. The checkpoint determines which states exist: a fresh optimizer has none yet. Main weights
    that it has among its ``weights`` only are copied from there. Averages that the run does not continue are left out."""
    keys: dict[str, list[str]] = {}
    for name in stored:
        parameter, key = name.rsplit("/", 1)
        keys.setdefault(parameter, []).append(key)
    wanted: dict[str, FlatRanges] = {}
    averages = optimizer.options.ema_decay > 0
    for piece in optimizer.pieces():
        of_piece = [key for key in keys.get(piece.name, []) if averages or key != AVERAGE]
        in_weights = MAIN not in of_piece and piece.name in weights and are_main(weights[piece.name])
        if not of_piece and not (in_weights and piece.name in trained):
            raise CheckpointError(
                f"{folder} has no optimizer state for {piece.name}: it is from a different model or optimizer"
            )
        if in_weights:
            flat = weights[piece.name].reshape(-1)
            piece.main.copy_(torch.cat([flat[run.offset : run.offset + run.length] for run in piece.runs]))
        state = optimizer.inner.state[piece.holder] if of_piece else {}
        for key in of_piece:
            name = f"{piece.name}/{key}"
            size, dtype = stored[name].size.numel(), stored[name].properties.dtype
            if key.startswith(SCALAR):  # the parameters of a bucket share the scalar, so they all stored the same value
                scalar = state.setdefault(
                    key.removeprefix(SCALAR), torch.zeros((), dtype=dtype, device=piece.main.device)
                )
                wanted[name] = FlatRanges.whole(scalar.reshape(1))
                continue
            if _SIZES.fullmatch(key):
                state_name, shape = state_of(key, tuple(piece.holder.shape))
                value = state.setdefault(state_name, torch.zeros(shape, dtype=dtype, device=piece.main.device))
                wanted[name] = _other_size(piece, value)
                continue
            if size != piece.numel:
                raise CheckpointError(f"{folder}: {name} has {size} elements, but this model's parameter {piece.numel}")
            part = piece.main
            if key != MAIN:
                whole = state.setdefault(key, torch.zeros_like(piece.holder.data, dtype=dtype))
                part = whole.view(-1)[piece.start : piece.start + len(piece.main)]
            wanted[name] = FlatRanges(piece.numel, piece.runs, part)
    return wanted
