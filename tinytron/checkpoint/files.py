"""The names of a checkpoint's files, which checkpoints of a folder are complete, and which are kept."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytron.errors import CheckpointError, first_line
from tinytron.utils.training import sha256_of, sync_folder


@dataclass(frozen=True)
class CheckpointFiles:
    """One checkpoint: weights, optimizer states, and metadata. The metadata is written last: its presence says that the
    rest is whole. ``step`` is the number of completed optimizer steps."""

    folder: Path
    step: int

    @property
    def model(self) -> Path:
        """Consolidated weights, for plain ``torch.load``."""
        return self.folder / f"{self.step:05d}_model.pt"

    @property
    def optimizer(self) -> Path:
        """Folder of sharded optimizer states and main weights, in the format of torch.distributed.checkpoint."""
        return self.folder / f"{self.step:05d}_opt"

    @property
    def meta(self) -> Path:
        """Step, configuration, data position, random states, and size and checksum of every other file."""
        return self.folder / f"{self.step:05d}_meta.pt"

    @property
    def complete(self) -> bool:
        """Whether all parts are there."""
        return self.meta.is_file() and self.model.is_file() and (self.optimizer / ".metadata").is_file()

    @property
    def parts(self) -> tuple[Path, Path, Path]:
        """Weights, folder of states, metadata."""
        return self.model, self.optimizer, self.meta

    def remove(self) -> None:
        """Delete it, metadata first: from then on, whatever happens, nobody takes the rest for a checkpoint."""
        if self.meta.exists():
            self.meta.unlink()
            sync_folder(self.folder)
        self.model.unlink(missing_ok=True)
        shutil.rmtree(self.optimizer, ignore_errors=True)

    def part_names(self) -> list[str]:
        """All files but the metadata, relative to the folder, on whatever node each rank has written its own. Raises:
        CheckpointError if the optimizer's table of contents is damaged."""
        from torch.distributed.checkpoint import FileSystemReader  # takes a second to import

        try:
            stored = FileSystemReader(self.optimizer).read_metadata().storage_data.values()
        except Exception as error:  # damaged pickles raise all sorts
            raise damaged(self.optimizer / ".metadata", error) from error
        states = sorted({place.relative_path for place in stored})
        return [self.model.name, *(f"{self.optimizer.name}/{name}" for name in (*states, ".metadata"))]

    def names_written_by(self, rank: int) -> list[str]:
        """Those of ``part_names`` that ``rank`` wrote, as torch.distributed.checkpoint names them."""
        states = sorted(self.optimizer.glob(f"__{rank}_*.distcp"))
        shared = [self.model, self.optimizer / ".metadata"] if rank == 0 else []
        return [str(path.relative_to(self.folder)) for path in (*states, *shared)]


def damaged(path: Path, error: BaseException | str) -> CheckpointError:
    """The error for a part that cannot be read, in one line."""
    return CheckpointError(f"{path} cannot be read ({first_line(error)})")


def complete_checkpoints(folder: Path) -> list[CheckpointFiles]:
    """The complete checkpoints of ``folder``, newest first."""
    return [files for files in reversed(checkpoints_with_metadata(folder)) if files.complete]


def checkpoints_with_metadata(folder: Path) -> list[CheckpointFiles]:
    """The checkpoints of ``folder`` that have metadata, in whatever condition, oldest first."""
    found = (checkpoint_of(meta) for meta in folder.glob("*_meta.pt"))
    return sorted((files for files in found if files is not None), key=lambda files: files.step)


def newest_checkpoint(folder: Path) -> CheckpointFiles | None:
    """The complete checkpoint of ``folder`` with the highest step, or ``None``."""
    return next(iter(complete_checkpoints(folder)), None)


def checkpoint_of(path: Path) -> CheckpointFiles | None:
    """The checkpoint that the file, or folder of states, ``path`` is a part of by its name, else ``None``."""
    match = re.fullmatch(r"(\d+)_(model\.pt|meta\.pt|opt)", path.name)
    return CheckpointFiles(path.parent, int(match[1])) if match else None


def leftovers(folder: Path) -> list[Path]:
    """What interrupted saves and removals left in ``folder``: temporary files, and parts whose metadata is not there.
    Weights all by themselves are none: somebody may have kept just those.

    A save under way looks the same: only whoever holds the folder's lock may take them for leftovers.
    """
    found = []
    for path in sorted(folder.iterdir()):
        files = checkpoint_of(path.with_name(path.name.removesuffix(".tmp")))
        if files is None or path.is_symlink():
            continue
        temporary = path.name.endswith(".tmp") and path.is_file()
        has_states = files.optimizer.is_dir()
        part = has_states and (path == files.optimizer or (path == files.model and path.is_file()))
        if temporary or (part and not files.meta.exists()):
            found.append(path)
    return found


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete the ``leftovers`` of ``folder``, whose lock is held; returns them. Raises: OSError if the system refuses."""
    found = leftovers(folder)
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def bytes_of(paths: Iterable[Path]) -> int:
    """Bytes in files and folders; what is not there counts nothing."""
    files = (inner for path in paths for inner in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file())


def find_checkpoints(path: str) -> list[CheckpointFiles]:
    """The checkpoints that ``--resume_path`` names, best first: all of a run folder, or the one of a checkpoint's file.

    Raises: CheckpointError if there is none, or it is incomplete.
    """
    place = Path(path)
    if place.is_dir() and not place.name.endswith("_opt"):
        found = complete_checkpoints(place)
        if not found:
            raise CheckpointError(f"--resume_path {path} holds no complete checkpoint (no *_meta.pt with its parts)")
        return found
    files = checkpoint_of(place)
    if files is None:
        raise CheckpointError(
            f"--resume_path {path} is neither a run folder nor a checkpoint file; use log/<run> or log/<run>/00100_model.pt"
        )
    if not files.complete:
        raise CheckpointError(
            f"--resume_path {path}: checkpoint {files.step} is incomplete; it needs {files.model.name}, "
            f"{files.optimizer.name}/ and {files.meta.name} in {files.folder}"
        )
    return [files]


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as the metadata keeps them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def verify(folder: Path, sums: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> None:
    """Compare the files ``names`` (relative to ``folder``) with their ``sums``.

    Raises: CheckpointError naming the first file that is missing or differs, and how.
    """
    for name in names:
        path, expected = folder / name, sums[name]
        if not path.is_file():
            raise damaged(path, "it is missing")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise damaged(path, f"it has {size:,} bytes, {expected['bytes']:,} were written")
        if checksum(path) != expected:
            raise damaged(path, "its SHA-256 is not that of what was written")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest ``keep_last``, every multiple of ``keep_every`` steps (0: none for that reason),
    and with ``keep_best`` the one of the lowest validation loss. ``keep_last`` 0 means all, or beside the others 1."""

    keep_last: int = 0
    keep_every: int = 0
    keep_best: bool = False

    def to_prune(self, losses: Mapping[int, float | None]) -> list[int]:
        """The steps to delete, oldest first. ``losses``: the validation loss of each complete checkpoint, where known."""
        newest = self.keep_last or int(bool(self.keep_every or self.keep_best))
        if newest == 0:
            return []
        steps = sorted(losses)
        kept = set(steps[-newest:])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        known = {step: loss for step, loss in losses.items() if loss is not None and not math.isnan(loss)}
        if self.keep_best and known:
            kept.add(min(known, key=lambda step: (known[step], step)))
        return [step for step in steps if step not in kept]
