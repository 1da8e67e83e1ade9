"""Checking, consolidating and pruning checkpoints in one process, whichever layout wrote them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from tinytron.checkpoint.files import (
    CheckpointFiles,
    Retention,
    bytes_of,
    checkpoint_of,
    checkpoints_with_metadata,
    damaged,
    leftovers,
    newest_checkpoint,
    remove_leftovers,
    verify,
)
from tinytron.checkpoint.load import read_file, read_meta
from tinytron.checkpoint.optimizer_state import MAIN, are_main, read_states, state_of, stored_states
from tinytron.checkpoint.report import states_by_parameter
from tinytron.checkpoint.save import to_prune
from tinytron.checkpoint.sharded import FlatRanges
from tinytron.errors import CheckpointError, ConfigError
from tinytron.utils.lock import lock_folder
from tinytron.utils.progress import Progress
from tinytron.utils.training import write_atomically


def checkpoints_at(path: Path) -> list[CheckpointFiles]:
    """The checkpoints of a run folder that have metadata, complete or not, oldest first; or the checkpoint that the file
    ``path`` belongs to. Raises: CheckpointError if ``path`` is neither."""
    one = checkpoint_of(path)
    if one is not None and path.exists():
        return [one]
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a run folder nor a checkpoint file; use log/<run> or a file in it")
    return checkpoints_with_metadata(path)


def problems(files: CheckpointFiles) -> list[str]:
    """One line for each problem of a checkpoint: files that changed since they were written, and states that do not cover
    their parameter."""
    try:
        meta = read_meta(files.meta)
    except CheckpointError as error:
        return [str(error)]
    parts = [files.model, files.optimizer / ".metadata", *sorted(files.optimizer.glob("*.distcp"))]
    names = [str(path.relative_to(files.folder)) for path in parts]
    found = [f"{files.folder / name} has no checksum in {files.meta.name}" for name in names if name not in meta.files]
    with Progress(
        f"verifying checkpoint {files.step}", sum(facts["bytes"] for facts in meta.files.values())
    ) as progress:
        for name in sorted(meta.files):
            try:
                verify(files.folder, meta.files, [name], progress.update)
            except CheckpointError as error:
                found.append(str(error))
    try:
        return found or _uncovered(files, meta.parameters)
    except CheckpointError as error:
        return [str(error)]


def _uncovered(files: CheckpointFiles, parameters: dict[str, list[int]]) -> list[str]:
    stored = stored_states(files.optimizer)
    weights = read_file(files.model, mmap=True)
    found = [
        f"{files.optimizer} lacks {name}/{MAIN}"
        for name in parameters
        if f"{name}/{MAIN}" not in stored and not (name in weights and are_main(weights[name]))
    ]
    for key, entry in stored.items():
        name, state = key.rsplit("/", 1)
        size, count = entry.size.numel(), covered(entry.chunks)
        expected = math.prod(state_of(state, tuple(parameters[name]))[1]) if name in parameters else size
        if count != size:
            found.append(f"{files.optimizer} has {count} of the {size} elements of {key}")
        elif size != expected:
            found.append(f"{files.optimizer} has {size} elements of {key}, but the parameter {expected}")
    return found


def covered(chunks: Iterable[ChunkStorageMetadata]) -> int:
    """Number of elements in the union of flat ranges."""
    count = end = 0
    for start, length in sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in chunks):
        count += max(0, start + length - max(start, end))
        end = max(end, start + length)
    return count


def consolidate(files: CheckpointFiles, out: Path | None = None) -> Path:
    """Write main weights and optimizer states as plain tensors in their real shapes to one file, and return its path.

    The file holds ``{"step", "model": {name: tensor}, "optimizer": {name: {state: tensor}}, "meta"}``; ``model`` is a whole
    ``state_dict`` in which tied tensors stay tied. Raises: CheckpointError for a damaged checkpoint, ConfigError if ``out``
    has the name of a checkpoint part, OSError if the disk refuses.
    """
    out = out or files.folder / f"{files.step:05d}_consolidated.pt"
    if checkpoint_of(out) is not None:
        raise ConfigError(f"--out {out} has the name of a part of a checkpoint; use another name")
    if found := problems(files):
        raise CheckpointError(found[0])
    meta = read_meta(files.meta)
    weights = read_file(files.model, mmap=True)
    content: dict[str, Any] = {
        "step": files.step,
        "model": {},
        "optimizer": {},
        "meta": {
            key: value for key, value in meta.as_dict().items() if key not in ("files", "rng")
        },  # "files" and "rng" describe the sharded files
    }
    wanted: dict[str, FlatRanges] = {}
    states = states_by_parameter(files)
    places = dict[int, torch.Tensor]()
    if unknown := states.keys() - weights.keys():
        raise damaged(files.optimizer, f"it has states of {min(unknown)}, which {files.model.name} lacks")
    for name, weight in weights.items():
        for key, entry in states.get(name, {}).items():
            state, shape = state_of(key, tuple(weight.shape))
            if entry.size.numel() != math.prod(shape):
                raise damaged(files.optimizer, f"{name}/{key} and {name} differ in size")
            tensor = _on_disk(out, shape, entry.properties.dtype)
            wanted[f"{name}/{key}"] = FlatRanges.whole(tensor.view(-1))
            if key == MAIN:
                places[weight.data_ptr()] = tensor
            else:
                content["optimizer"].setdefault(name, {})[state] = tensor
    # A tied tensor takes the main weights of the tensor it is tied to; an untrained tensor stays as it is.
    content["model"] = {name: places.get(weight.data_ptr(), weight) for name, weight in weights.items()}
    read_states(wanted, files.optimizer)
    write_atomically(out, lambda file: torch.save(content, file))
    return out


def _on_disk(out: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor backed by an unnamed file next to ``out``. ``torch.save`` needs all tensors before it writes the first, and
    the checkpoint need not fit into memory."""
    with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f"{out.name}.", suffix=".tmp") as file:
        count = math.prod(shape)
        if hasattr(os, "posix_fallocate"):  # on a full disk this raises an error; writing to the map would crash
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


@dataclass(frozen=True)
class Pruned:
    """Files that were deleted, or that a dry run would delete."""

    checkpoints: list[int]
    leftovers: list[str]
    bytes_freed: int


def prune_folder(folder: Path, retention: Retention, *, dry_run: bool = False) -> Pruned:
    """Delete the checkpoints that ``retention`` does not keep and the leftovers of interrupted saves; with ``dry_run`` only
    list them.

    Raises: ConfigError if a live run holds the folder, CheckpointError if the newest checkpoint is damaged (the older ones
    may be all that is left), OSError if the system refuses.
    """
    with lock_folder(folder, "stop it, or let it prune with --keep_last"):
        gone, left = to_prune(folder, retention), leftovers(folder)
        if gone:
            _require_newest(folder)
        paths = [*(part for files in gone for part in files.parts), *left]
        size = bytes_of(paths)
        if not dry_run:
            for files in gone:
                files.remove()
            remove_leftovers(folder)
            size -= bytes_of(paths)
        return Pruned([files.step for files in gone], [path.name for path in left], size)


def _require_newest(folder: Path) -> None:
    newest = newest_checkpoint(folder)
    assert newest is not None, "only an older checkpoint can be pruned, so there is a newest one"
    if found := problems(newest):
        raise CheckpointError(
            f"{found[0]}; nothing is deleted while the newest checkpoint is damaged: remove it yourself"
        )
