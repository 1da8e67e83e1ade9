"""The file names of a checkpoint, the complete checkpoints of a folder, and the rule for which ones to keep."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytron.errors import CheckpointError, first_line
from tinytron.utils.training import sha256_of, sync_folder


@dataclass(frozen=True)
class CheckpointFiles:
    """One checkpoint: weights, optimizer states, and metadata. The metadata is written last, so its presence says that
    everything else is complete. ``step`` is the number of completed optimizer steps."""

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
        """Step, configuration, data position, random states, and the size and checksum of every other file."""
        return self.folder / f"{self.step:05d}_meta.pt"

    @property
    def complete(self) -> bool:
        """True if all parts are present."""
        return self.meta.is_file() and self.model.is_file() and (self.optimizer / ".metadata").is_file()

    @property
    def parts(self) -> tuple[Path, Path, Path]:
        """Weights, folder of states, metadata."""
        return self.model, self.optimizer, self.meta

    def remove(self) -> None:
        """Delete the checkpoint, metadata first: if the deletion is interrupted after that, no reader takes what is left
        for a checkpoint."""
        if self.meta.exists():
            self.meta.unlink()
            sync_folder(self.folder)
        self.model.unlink(missing_ok=True)
        shutil.rmtree(self.optimizer, ignore_errors=True)

    def part_names(self) -> list[str]:
        """All files except the metadata, relative to the folder, including those that other nodes hold. Raises:
        CheckpointError if the optimizer's table of contents is damaged."""
        from torch.distributed.checkpoint import FileSystemReader  # takes a second to import

        try:
            stored = FileSystemReader(self.optimizer).read_metadata().storage_data.values()
        except Exception as error:  # damaged pickles raise all sorts
            raise damaged(self.optimizer / ".metadata", error) from error
        states = sorted({place.relative_path for place in stored})
        return [self.model.name, *(f"{self.optimizer.name}/{name}" for name in (*states, ".metadata"))]

    def names_written_by(self, rank: int) -> list[str]:
        """The subset of ``part_names`` that ``rank`` wrote, recognized by torch.distributed.checkpoint's file names."""
        states = sorted(self.optimizer.glob(f"__{rank}_*.distcp"))
        shared = [self.model, self.optimizer / ".metadata"] if rank == 0 else []
        return [str(path.relative_to(self.folder)) for path in (*states, *shared)]


def damaged(path: Path, error: BaseException | str) -> CheckpointError:
    """A one-line error for a part that cannot be read."""
    return CheckpointError(f"{path} cannot be read ({first_line(error)})")


def complete_checkpoints(folder: Path) -> list[CheckpointFiles]:
    """The complete checkpoints of ``folder``, newest first."""
    return [files for files in reversed(checkpoints_with_metadata(folder)) if files.complete]


def checkpoints_with_metadata(folder: Path) -> list[CheckpointFiles]:
    """The checkpoints of ``folder`` that have metadata, complete or not, oldest first."""
    found = (checkpoint_of(meta) for meta in folder.glob("*_meta.pt"))
    return sorted((files for files in found if files is not None), key=lambda files: files.step)


def newest_checkpoint(folder: Path) -> CheckpointFiles | None:
    """The complete checkpoint of ``folder`` with the highest step, or ``None``."""
    return next(iter(complete_checkpoints(folder)), None)


def checkpoint_of(path: Path) -> CheckpointFiles | None:
    """The checkpoint that ``path`` (a file or a folder of states) belongs to, judged by its name, or ``None``."""
    match = re.fullmatch(r"(\d+)_(model\.pt|meta\.pt|opt)", path.name)
    return CheckpointFiles(path.parent, int(match[1])) if match else None


def leftovers(folder: Path) -> list[Path]:
    """Files that interrupted saves and removals left in ``folder``: temporary files, and parts without metadata.
    Weights on their own do not count: a user may have kept only those.

    A save in progress looks the same, so only the process that holds the folder's lock may treat these as leftovers.
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
    """Delete the ``leftovers`` of ``folder`` and return them; the caller holds the folder's lock. Raises: OSError if the
    system refuses."""
    found = leftovers(folder)
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def bytes_of(paths: Iterable[Path]) -> int:
    """Total bytes in files and folders; missing paths are skipped."""
    files = (inner for path in paths for inner in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file())


def find_checkpoints(path: str) -> list[CheckpointFiles]:
    """The checkpoints that ``--resume_path`` names, best first: every one in a run folder, or the one a file belongs to.

    Raises: CheckpointError if the checkpoint is missing or incomplete.
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


def checksum(path: Path, advance: Callable[[int], object] = lambda size: None) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, in the form that the metadata stores; ``advance`` as in ``sha256_of``."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path, advance)}


def verify(
    folder: Path,
    sums: Mapping[str, Mapping[str, Any]],
    names: Iterable[str],
    advance: Callable[[int], object] = lambda size: None,
) -> None:
    """Compare the files ``names`` (relative to ``folder``) with their checksums ``sums``; ``advance`` as in ``sha256_of``.

    Raises: CheckpointError naming the first file that is missing or differs, and how it differs.
    """
    for name in names:
        path = folder / name
        expected = sums[name]
        if not path.is_file():
            raise damaged(path, "it is missing")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise damaged(path, f"it has {size:,} bytes, but {expected['bytes']:,} were written")
        if checksum(path, advance) != expected:
            raise damaged(path, "its SHA-256 differs from the one recorded when it was written")


@dataclass(frozen=True)
class Retention:
    """The rule for which checkpoints to keep: the newest ``keep_last``, every multiple of ``keep_every`` steps (0: off),
    and with ``keep_best`` the one with the lowest cost (``CheckpointMeta.cost``). ``keep_last`` 0 keeps all, or just 1 if
    another rule is on."""

    keep_last: int = 0
    keep_every: int = 0
    keep_best: bool = False

    def to_prune(self, losses: Mapping[int, float | None]) -> list[int]:
        """The steps to delete, oldest first. ``losses`` maps each complete checkpoint's step to its cost, or ``None`` if it
        is unknown."""
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
