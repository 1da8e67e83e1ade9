"""The names of a checkpoint's files, and which checkpoints of a folder are complete."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tinytron.errors import CheckpointError


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
        """Step, configuration, data position and random states."""
        return self.folder / f"{self.step:05d}_meta.pt"

    @property
    def complete(self) -> bool:
        """Whether all parts are there."""
        return self.meta.is_file() and self.model.is_file() and (self.optimizer / ".metadata").is_file()

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
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(f"{path} cannot be read ({reason}); remove this checkpoint to use the one before")


def newest_checkpoint(folder: Path) -> CheckpointFiles | None:
    """The complete checkpoint of ``folder`` with the highest step, or ``None``."""
    found = [
        CheckpointFiles(folder, int(m[1])) for p in folder.glob("*_meta.pt") if (m := re.match(r"(\d+)_meta", p.name))
    ]
    return max((c for c in found if c.complete), key=lambda c: c.step, default=None)


def find_checkpoint(path: str) -> CheckpointFiles:
    """The checkpoint that ``--resume_path`` names: a run folder (its newest), or one of a checkpoint's files.

    Raises: CheckpointError if there is none, or it is incomplete.
    """
    place = Path(path)
    if place.is_dir() and not place.name.endswith("_opt"):
        newest = newest_checkpoint(place)
        if newest is None:
            raise CheckpointError(f"--resume_path {path} holds no complete checkpoint (no *_meta.pt with its parts)")
        return newest
    match = re.fullmatch(r"(\d+)_(model\.pt|meta\.pt|opt)", place.name)
    if match is None:
        raise CheckpointError(
            f"--resume_path {path} is neither a run folder nor a checkpoint file; use log/<run> or log/<run>/00100_model.pt"
        )
    files = CheckpointFiles(place.parent, int(match[1]))
    if not files.complete:
        raise CheckpointError(
            f"--resume_path {path}: checkpoint {files.step} is incomplete; it needs {files.model.name}, "
            f"{files.optimizer.name}/ and {files.meta.name} in {files.folder}"
        )
    return files
