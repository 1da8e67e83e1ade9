"""The checkpoints of a job by name: ``latest``, ``best``, ``final`` or a step.

A job's folder contains the folders of its runs: one, unless options that identify a run were changed. ``latest``, ``best``
and ``final`` are also files there, written when the job ends, with the path of a checkpoint's weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from tinytron.checkpoint.files import CheckpointFiles, complete_checkpoints
from tinytron.checkpoint.save import costs
from tinytron.errors import CheckpointError
from tinytron.job import CHECKPOINTS
from tinytron.utils.lock import lock_folder
from tinytron.utils.training import write_atomically

LATEST = "latest"
BEST = "best"
FINAL = "final"


def newest_run(folder: Path) -> list[CheckpointFiles]:
    """The checkpoints, newest first, of the run in the job's ``folder`` that saved last, without those moved aside."""
    name = re.compile(re.escape(folder.name) + "_[0-9a-f]{8}")
    found = [path for path in folder.glob("*/") if name.fullmatch(path.name)]
    runs = [complete_checkpoints(path) for path in found]
    return max((run for run in runs if run), key=lambda run: run[0].meta.stat().st_mtime, default=[])


def best_of(run: list[CheckpointFiles]) -> CheckpointFiles | None:
    """The best checkpoint of ``run``, newest first: by its validation loss or ``--best_metric``, if it is known of any."""
    known = costs(run)
    return min((files for files in run if files.step in known), key=lambda f: (known[f.step], f.step), default=None)


def named_checkpoint(folder: Path, name: str) -> CheckpointFiles:
    """The checkpoint ``name`` of the job in ``folder``: ``latest``, ``best``, ``final`` or a step. Raises: CheckpointError
    if it does not exist, with a list of those that do."""
    run = newest_run(folder)
    steps = {str(files.step): files for files in run}
    found = {LATEST: run[0] if run else None, BEST: best_of(run) if name == BEST else None, **steps}.get(name)
    if name == FINAL and (pointer := folder / FINAL).is_file():
        final = folder / pointer.read_text(encoding="utf-8").strip()
        found = next((files for files in run if files.model == final), None)
    if found is None:
        have = f"it has {', '.join(steps)}" if steps else "it has saved none yet"
        raise CheckpointError(f"{folder} has no checkpoint {name}; {have} (latest, best, final or a step)")
    return found


def find_checkpoint(root: str, relative: str) -> CheckpointFiles:
    """The checkpoint of another job: ``[[PROJECT/]GROUP/]NAME[/CHECKPOINT]`` below ``root``'s checkpoints, by default its
    latest one. Raises: CheckpointError if it does not exist."""
    parts = relative.strip("/").split("/")
    if not all(parts) or {".", ".."} & set(parts):
        raise CheckpointError(f"restore {relative!r} must be NAME or NAME/CHECKPOINT, such as my-run/best")
    top = Path(root) / CHECKPOINTS
    for count in (len(parts), len(parts) - 1):
        place = parts[:count]
        if 0 < len(place) <= 3:
            folder = top.joinpath(*("general", "default")[: 3 - len(place)], *place)
            if folder.is_dir():
                return named_checkpoint(folder, parts[count] if count < len(parts) else LATEST)
    jobs = sorted(str(path.relative_to(top)) for path in top.glob("*/*/*") if path.is_dir())
    have = f"there are {', '.join(jobs[:5])}" if jobs else f"there are none in {top}"
    raise CheckpointError(f"there is no job {relative}; {have}")


def set_later_aside(run: list[CheckpointFiles], chosen: CheckpointFiles) -> Path | None:
    """Move the checkpoints of ``run`` after ``chosen`` into a folder next to the run's; returns that folder, or ``None`` if
    there are none. Raises: ConfigError if the run is in progress."""
    later = [files for files in run if files.step > chosen.step]
    if not later:
        return None
    with lock_folder(chosen.folder, "stop it first"):
        names = (chosen.folder.with_name(f"{chosen.folder.name}.after_{chosen.step}.{n}") for n in range(1, 10**6))
        aside = next(path for path in names if not path.exists())
        aside.mkdir()
        for files in later:
            for part in reversed(files.parts):  # metadata first: without it the rest is not a checkpoint
                part.rename(aside / part.name)
    return aside


def write_pointers(folder: Path, *, final: bool = False) -> None:
    """Write the files ``latest``, ``best`` and, at the end of the job, ``final``."""
    run = newest_run(folder)
    if not run:
        return
    pointers = {LATEST: run[0], BEST: best_of(run)}
    if final:
        pointers[FINAL] = run[0]
    for name, files in pointers.items():
        if files is not None:
            _point(folder / name, files)


def _point(pointer: Path, files: CheckpointFiles) -> None:
    text = f"{files.model.relative_to(pointer.parent)}\n".encode()
    write_atomically(pointer, lambda file: file.write(text))
