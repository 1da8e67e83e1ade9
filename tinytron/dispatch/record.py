"""Submissions from this machine, one file per submission in ``~/.tinytron/submissions``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tinytron.errors import ConfigError
from tinytron.utils.flags import nearest

FOLDER = "~/.tinytron/submissions"


@dataclass(frozen=True)
class Submission:
    """A submission: the work, the host of the type ``kind``, where its files are there, and the ``id`` of its process or of
    the scheduler's job."""

    run_id: str
    name: str
    project: str
    group: str
    host: str
    kind: str
    ssh: str | None
    proxy: str | None
    id: str
    here: str
    root: str
    status: str
    log: str
    tree: str
    options: dict[str, str] = field(default_factory=dict)  # more about the host, by kind

    @property
    def place(self) -> str:
        """``project/group/name``."""
        return f"{self.project}/{self.group}/{self.name}"


def write(submission: Submission) -> Path:
    """Keep ``submission``. Returns its file. Raises: ConfigError if it cannot be written."""
    folder = Path(FOLDER).expanduser()
    file = folder / f"{submission.run_id}-{submission.name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(submission), indent=2), encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}), but {submission.name} runs on {submission.host} as "
            f"{submission.id}; make the folder writable"
        ) from error
    return file


def read_all() -> list[Submission]:
    """Every submission, the oldest first. Damaged files are left out."""
    found = []
    for file in sorted(Path(FOLDER).expanduser().glob("*.json")):
        try:
            found.append(Submission(**json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return found


def newest(submissions: Iterable[Submission]) -> list[Submission]:
    """The newest submission of each work."""
    return list({one.place: one for one in submissions}.values())


def named(name: str) -> Submission:
    """The newest submission of the work ``name``, which may also be given as ``project/group/name``. Raises: ConfigError if
    there is none, or if two works have that name."""
    all_of_them = newest(read_all())
    found = [one for one in all_of_them if name in (one.name, one.place)]
    if len(found) > 1:
        raise ConfigError(f"{name} may be {' or '.join(one.place for one in found)}; give the whole name")
    if not found:
        names = [one.name for one in all_of_them]
        raise ConfigError(f"nothing was submitted as {name}{nearest(name, names)}; tinytron status lists what was")
    return found[0]
